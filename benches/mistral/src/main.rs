//! mistral.rs on the prompts of `peers.py`: prefill and decode, in tokens per second, as one JSON line.
//!
//!     inwit-peer-mistral FILE.gguf PROSE.txt PROMPT CONTEXT ANSWER STREAMS,STREAMS,…
//!
//! Streams begin together, with prompts of one length: this version computes only sequences of one
//! length at a time. What counts is the time in which all of them write, from the first token of the
//! last to the last token of the first to end.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use either::Either;
use mistralrs::{
    Constraint, GgufModelBuilder, Model, NormalRequest, Request, RequestMessage, Response,
    SamplingParams,
};
use serde_json::json;
use tokio::sync::mpsc::{Receiver, channel};

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, prose, prompt, context, answer, streams] = &arguments[..] else {
        bail!("FILE.gguf PROSE.txt PROMPT CONTEXT ANSWER STREAMS,STREAMS");
    };
    let file = Path::new(file);
    let folder = file.parent().context("a file in a folder")?.display();
    let name = file.file_name().context("a file")?.to_string_lossy();
    let model = GgufModelBuilder::new(folder, vec![name])
        .with_max_num_seqs(32)
        .with_prefix_cache_n(None)
        .build()
        .await?;
    let prose = Either::Right(std::fs::read_to_string(prose)?);
    let tokens = model.tokenize(prose, None, false, false, None).await?;
    let (prompt, context, answer): (usize, usize, usize) =
        (prompt.parse()?, context.parse()?, answer.parse()?);

    let mut times = Vec::new();
    for turn in 0..3 {
        let begun = Instant::now();
        ask(&model, rotated(&tokens, turn, prompt), 1)
            .await?
            .end()
            .await?;
        times.push(begun.elapsed());
    }
    times.sort();
    let mut decode = serde_json::Map::new();
    for streams in streams.split(',') {
        let rate = write(&model, &tokens, streams.parse()?, context, answer).await?;
        decode.insert(streams.to_owned(), json!(rate));
    }
    let prefill = prompt as f64 / times[1].as_secs_f64();
    let report = json!({"prefill": prefill, "decode": decode, "peak_rss": peak_rss()?});
    println!("{report}");
    Ok(())
}

/// Bytes.
fn peak_rss() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let peak = lines.find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.context("a peak in /proc/self/status")?;
    let kibibytes: u64 = peak.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

/// As `inwit bench` begins each stream elsewhere in the prose.
fn rotated(tokens: &[u32], stream: usize, count: usize) -> Vec<u32> {
    let first = stream * 37 % tokens.len();
    tokens
        .iter()
        .cycle()
        .skip(first)
        .take(count)
        .copied()
        .collect()
}

/// A stream and when its tokens came.
struct Stream {
    responses: Receiver<Response>,
    came: Vec<Instant>,
    ended: bool,
}

impl Stream {
    /// Whether one more token came.
    async fn next(&mut self) -> Result<bool> {
        if self.ended {
            return Ok(false);
        }
        match self.responses.recv().await {
            Some(Response::CompletionChunk(chunk)) => {
                self.came.push(Instant::now());
                self.ended = chunk
                    .choices
                    .iter()
                    .any(|choice| choice.finish_reason.is_some());
                Ok(true)
            }
            None | Some(Response::CompletionDone(_)) => Ok(false),
            Some(Response::InternalError(error) | Response::ValidationError(error)) => {
                bail!("{error}")
            }
            Some(_) => bail!("an answer of another kind"),
        }
    }

    async fn end(mut self) -> Result<Vec<Instant>> {
        while self.next().await? {}
        Ok(self.came)
    }
}

/// A stream of at most `answer` tokens.
async fn ask(model: &Model, prompt: Vec<u32>, answer: usize) -> Result<Stream> {
    let (sender, responses) = channel(answer + 16);
    let sampling_params = SamplingParams {
        max_len: Some(answer),
        ..SamplingParams::deterministic()
    };
    let request = NormalRequest {
        is_streaming: true,
        constraint: Constraint::None,
        ..NormalRequest::new_simple(
            RequestMessage::CompletionTokens(prompt),
            sampling_params,
            sender,
            model.inner().next_request_id(),
            None,
            None,
        )
    };
    model
        .inner()
        .get_sender(None)?
        .send(Request::Normal(Box::new(request)))
        .await?;
    Ok(Stream {
        responses,
        came: Vec::new(),
        ended: false,
    })
}

async fn write(
    model: &Model,
    tokens: &[u32],
    streams: usize,
    context: usize,
    answer: usize,
) -> Result<f64> {
    let mut writing = Vec::new();
    for stream in 0..streams {
        let asked = ask(model, rotated(tokens, stream, context), answer).await?;
        writing.push(tokio::spawn(asked.end()));
    }
    let mut came = Vec::new();
    for stream in writing {
        came.push(stream.await??);
    }
    let firsts = came.iter().map(|came| came.first());
    let start = firsts.max().flatten().context("a stream")?;
    let lasts = came.iter().map(|came| came.last());
    let end = lasts.min().flatten().context("a stream without tokens")?;
    let counted = came.iter().flatten();
    let counted = counted.filter(|at| *at > start && *at <= end).count();
    if counted < (answer.min(8) / 2).max(1) * streams {
        bail!("{streams} streams wrote together for {counted} tokens only: they end by themselves");
    }
    Ok(counted as f64 / end.duration_since(*start).as_secs_f64())
}
