//! Writes to the terminal: colours only where they are seen, and a closed pipe is no crash.

use std::io::{IsTerminal, Write, stderr, stdout};

use owo_colors::{OwoColorize, Rgb};

use crate::error::{Error, Result};

/// Writes to standard output at once.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Error::file("standard output", error))
}

/// Writes a line to standard error; nobody is owed it.
pub(super) fn note(line: &str) {
    let _ = writeln!(stderr().lock(), "{line}");
}

/// Whether standard output shows colours: a terminal, and NO_COLOR unset (no-color.org).
pub(super) fn colours() -> bool {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    stdout().is_terminal() && !no_color
}

/// Text in the colour of its risk, from 0 (green) to 1 (red); unchanged without a risk.
pub(super) fn shaded(text: &str, risk: Option<f32>) -> String {
    let Some(risk) = risk else {
        return text.to_owned();
    };
    let risk = risk.clamp(0.0, 1.0);
    let mix = |safe: f32, risky: f32| (safe + (risky - safe) * risk) as u8;
    text.color(Rgb(mix(90.0, 235.0), mix(190.0, 60.0), mix(110.0, 60.0)))
        .to_string()
}

/// One letter per eighth of risk, for places without colours.
pub(super) fn bar(risk: f32) -> char {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    BARS[((risk.clamp(0.0, 1.0) * 8.0) as usize).min(7)]
}

/// How near a logit is to positive, from 0 to 1, for showing only: its logistic function, which is
/// no calibrated probability.
pub(super) fn risk(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}

/// At most `width` characters on one line.
pub(super) fn shortened(text: &str, width: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(width) {
        None => line,
        Some(_) => {
            let kept: String = line.chars().take(width.saturating_sub(1)).collect();
            format!("{}…", kept.trim_end())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_shortened_on_one_line_between_characters() {
        assert_eq!(shortened("a short\nprompt", 40), "a short prompt");
        assert_eq!(shortened("ééééé", 4), "ééé…");
    }

    #[test]
    fn a_bar_rises_with_the_risk() {
        assert_eq!([bar(-1.0), bar(0.5), bar(2.0)], ['▁', '▅', '█']);
        assert_eq!([bar(risk(-9.0)), bar(risk(0.0))], ['▁', '▅']);
    }

    #[test]
    fn text_without_a_risk_is_plain() {
        assert_eq!(shaded("Hi", None), "Hi");
        assert!(shaded("Hi", Some(0.9)).contains("\u{1b}["));
    }
}
