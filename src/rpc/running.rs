//! The events of one request, under its deadline and the server's drain.
//! Knows the order of events, not what they mean to a caller. Dropping it cancels the request.
//!
//! A task of its own takes the events from the engine, so that a caller who reads nothing holds
//! their memory no longer than its deadline.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::{self, BoxStream, Stream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::Status;

use super::call::Call;
use crate::engine::CaptureLease;
use crate::engine::event::Event;
use crate::error::{Error, Result};

/// How long after its deadline a caller may still fetch what happened before it.
const AFTERWARDS: Duration = Duration::from_millis(200);

pub(super) struct Running {
    shared: Arc<Shared>,
    pump: JoinHandle<()>,
    call: Call,
    ended: bool,
}

impl Running {
    /// `admit` sees each event as it comes, whether or not anybody reads; its error ends the
    /// request. `stop` ends it when the server can wait no longer; `in_flight` is let go at its end.
    pub(super) fn new(
        events: impl Stream<Item = Event> + Send + 'static,
        admit: impl FnMut(&Event) -> Result<()> + Send + 'static,
        call: Call,
        stop: CancellationToken,
        in_flight: TaskTrackerToken,
    ) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                source: events.boxed(),
                told: VecDeque::new(),
                in_flight: Some(in_flight),
                captures: None,
            }),
            news: Notify::new(),
        });
        let pump = Pump {
            shared: Arc::clone(&shared),
            call: call.clone(),
            stop,
            started: None,
            tokens: 0,
        };
        Self {
            shared,
            pump: tokio::spawn(pump.run(admit)),
            call,
            ended: false,
        }
    }

    /// Keeps the lease as long as the states that were captured under it.
    pub(super) fn under(self, lease: Arc<CaptureLease>) -> Self {
        self.shared.state().captures = Some(lease);
        self
    }

    /// The next event; an error is the last. `None` after `Completed` or an error.
    pub(super) async fn next(&mut self) -> Option<Result<Event>> {
        if self.ended {
            return None;
        }
        let event = loop {
            if let Some(event) = self.shared.state().told.pop_front() {
                break event;
            }
            tokio::select! {
                biased;
                () = self.shared.news.notified() => {}
                // It tells the end before it ends, unless it panicked.
                _ = &mut self.pump => {
                    let told = self.shared.state().told.pop_front();
                    break told.unwrap_or_else(|| Err(Error::internal("the events were lost: a panic")));
                }
            }
        };
        if is_last(&event) {
            self.end();
        }
        Some(event)
    }

    /// Cancels what is still running.
    fn end(&mut self) {
        self.ended = true;
        self.pump.abort();
        self.shared.state().clear();
    }

    /// The messages of a streaming reply: `items` makes any number from an event, `number` counts
    /// them from 0. An error of `items` cancels the request and ends the stream.
    pub(super) fn into_stream<Item, Message>(
        self,
        items: impl FnMut(Event) -> Result<Vec<Item>> + Send + 'static,
        number: impl Fn(u64, Item) -> Message + Send + 'static,
    ) -> BoxStream<'static, Result<Message, Status>>
    where
        Item: Send + 'static,
        Message: Send + 'static,
    {
        let source = Numbered {
            running: self,
            items,
            number,
            pending: VecDeque::new(),
            count: 0,
        };
        stream::unfold(source, |mut source| async move {
            let message = source.next().await?;
            Some((message, source))
        })
        .boxed()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn is_last(event: &Result<Event>) -> bool {
    matches!(event, Ok(Event::Completed(_)) | Err(_))
}

struct Shared {
    state: Mutex<State>,
    news: Notify,
}

struct State {
    /// From the engine; an empty one once the request has ended.
    source: BoxStream<'static, Event>,
    /// For the caller to fetch.
    told: VecDeque<Result<Event>>,
    /// Held until the end, so that a drain knows what it waits for.
    in_flight: Option<TaskTrackerToken>,
    captures: Option<Arc<CaptureLease>>,
}

impl State {
    fn cancel(&mut self) {
        self.source = stream::empty().boxed();
    }

    fn clear(&mut self) {
        self.cancel();
        self.told = VecDeque::new();
        self.captures = None;
        self.in_flight = None;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn next_event(&self) -> Option<Event> {
        std::future::poll_fn(|context| self.state().source.poll_next_unpin(context)).await
    }

    fn tell(&self, event: Result<Event>) {
        let mut state = self.state();
        if is_last(&event) {
            state.cancel();
        }
        state.told.push_back(event);
        drop(state);
        self.news.notify_one();
    }
}

/// Takes events from the engine as they come.
struct Pump {
    shared: Arc<Shared>,
    call: Call,
    stop: CancellationToken,
    started: Option<Instant>,
    tokens: u32,
}

impl Pump {
    async fn run(mut self, mut admit: impl FnMut(&Event) -> Result<()>) {
        let deadline = tokio::time::Instant::from_std(self.call.deadline);
        loop {
            let event = self.next(deadline).await;
            let event = event.and_then(|event| admit(&event).map(|()| event));
            if let Ok(event) = &event {
                self.count(event);
            }
            let last = is_last(&event);
            self.shared.tell(event);
            if last {
                break;
            }
        }
        // Whoever fetches the end also ends this task; nobody else comes for it.
        tokio::time::sleep_until(deadline + AFTERWARDS).await;
        self.shared.state().clear();
        self.shared.tell(Err(self.late()));
    }

    async fn next(&self, deadline: tokio::time::Instant) -> Result<Event> {
        tokio::select! {
            // What has happened is told before what is late.
            biased;
            event = self.shared.next_event() => match event {
                Some(Event::Failed(error)) => Err(error),
                Some(event) => Ok(event),
                None => Err(Error::Unavailable("the engine has stopped".into())),
            },
            () = self.stop.cancelled() => {
                Err(Error::Unavailable("the server is shutting down".into()))
            }
            () = tokio::time::sleep_until(deadline) => Err(self.late()),
        }
    }

    fn count(&mut self, event: &Event) {
        match event {
            Event::Started(_) => self.started = Some(Instant::now()),
            Event::Delta(delta) => {
                let count = u32::try_from(delta.token_ids.len()).unwrap_or(u32::MAX);
                self.tokens = self.tokens.saturating_add(count);
            }
            _ => {}
        }
    }

    fn late(&self) -> Error {
        let queued = self.started.unwrap_or_else(Instant::now) - self.call.arrived;
        Error::DeadlineExceeded {
            queue_ms: u64::try_from(queued.as_millis()).unwrap_or(u64::MAX),
            tokens_done: self.tokens,
        }
    }
}

struct Numbered<Items, Number, Item> {
    running: Running,
    items: Items,
    number: Number,
    pending: VecDeque<Item>,
    count: u64,
}

impl<Items, Number, Item, Message> Numbered<Items, Number, Item>
where
    Items: FnMut(Event) -> Result<Vec<Item>>,
    Number: Fn(u64, Item) -> Message,
{
    async fn next(&mut self) -> Option<Result<Message, Status>> {
        loop {
            if let Some(item) = self.pending.pop_front() {
                let message = (self.number)(self.count, item);
                self.count += 1;
                return Some(Ok(message));
            }
            let event = self.running.next().await?;
            match event.and_then(&mut self.items) {
                Ok(items) => self.pending.extend(items),
                Err(error) => {
                    self.running.end();
                    return Some(Err(self.running.call.status(&error)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio_util::task::TaskTracker;
    use tonic::Code;
    use tonic::metadata::MetadataMap;

    use super::*;
    use crate::engine::event::{Delta, Started};
    use crate::rpc::call::Deadlines;
    use crate::rpc::reply::tests::completed;

    fn call(timeout: Duration) -> Call {
        let deadlines = Deadlines {
            default: timeout,
            max: timeout,
        };
        Call::begin(&MetadataMap::new(), "r1", deadlines).expect("begins")
    }

    fn started() -> Event {
        Event::Started(Started {
            policy_revision: 1,
            cached_tokens: 0,
        })
    }

    fn delta(tokens: &[u32]) -> Event {
        Event::Delta(Delta {
            token_ids: tokens.to_vec(),
            ..Delta::default()
        })
    }

    fn end() -> Event {
        Event::Completed(Box::new(completed()))
    }

    fn running(events: Vec<Event>, then: BoxStream<'static, Event>) -> Running {
        let events = stream::iter(events).chain(then);
        let stop = CancellationToken::new();
        let in_flight = TaskTracker::new().token();
        let call = call(Duration::from_secs(60));
        Running::new(events, admit_all, call, stop, in_flight)
    }

    fn admit_all(_: &Event) -> Result<()> {
        Ok(())
    }

    /// The engine's side notices from a task of its own.
    async fn eventually(holds: impl Fn() -> bool) {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Stands for the engine's side of a request: knows when nobody listens any more.
    fn open(guard: Arc<()>) -> BoxStream<'static, Event> {
        stream::pending().inspect(move |_| _ = &guard).boxed()
    }

    async fn all(running: &mut Running) -> Vec<Result<&'static str>> {
        let mut seen = Vec::new();
        while let Some(event) = running.next().await {
            seen.push(event.map(|event| match event {
                Event::Started(_) => "started",
                Event::Delta(_) => "delta",
                Event::Completed(_) => "completed",
                _ => "other",
            }));
        }
        seen
    }

    #[tokio::test]
    async fn nothing_follows_the_end() {
        let after = stream::iter([delta(&[1]), end()]).boxed();
        let mut running = running(vec![started(), delta(&[1]), end()], after);
        let seen = all(&mut running).await;
        assert_eq!(seen, [Ok("started"), Ok("delta"), Ok("completed")]);
        assert!(running.next().await.is_none());
    }

    #[tokio::test]
    async fn an_engine_that_goes_silent_for_ever_is_unavailable() {
        let mut running = running(vec![started()], stream::empty().boxed());
        let seen = all(&mut running).await;
        assert!(matches!(
            seen.as_slice(),
            [Ok("started"), Err(Error::Unavailable(_))]
        ));
    }

    #[tokio::test]
    async fn a_deadline_ends_the_request_and_says_how_far_it_came() {
        let guard = Arc::new(());
        let events = stream::iter([started(), delta(&[1, 2])]).chain(open(guard.clone()));
        let soon = call(Duration::from_millis(20));
        let tracker = TaskTracker::new();
        let mut running = Running::new(
            events,
            admit_all,
            soon,
            CancellationToken::new(),
            tracker.token(),
        );
        let seen = all(&mut running).await;
        assert!(tracker.is_empty(), "a drain still waits for it");
        let Some(Err(Error::DeadlineExceeded { tokens_done, .. })) = seen.last() else {
            panic!("{seen:?}");
        };
        assert_eq!(*tokens_done, 2);
        assert_eq!(Arc::strong_count(&guard), 1, "the request still runs");
    }

    #[tokio::test]
    async fn a_drain_ends_the_request_after_what_has_happened() {
        let guard = Arc::new(());
        let stop = CancellationToken::new();
        stop.cancel();
        let events = stream::iter([started(), delta(&[1])]).chain(open(guard.clone()));
        let in_flight = TaskTracker::new().token();
        let mut running = Running::new(
            events,
            admit_all,
            call(Duration::from_secs(60)),
            stop,
            in_flight,
        );
        let seen = all(&mut running).await;
        assert!(matches!(
            seen.as_slice(),
            [Ok("started"), Ok("delta"), Err(Error::Unavailable(_))]
        ));
        assert_eq!(Arc::strong_count(&guard), 1, "the request still runs");
    }

    #[tokio::test]
    async fn events_are_numbered_from_zero_without_a_hole() {
        let running = running(vec![started(), delta(&[1]), end()], stream::empty().boxed());
        let twice_or_never = |event| {
            Ok(match event {
                Event::Delta(_) => vec![],
                _ => vec![(), ()],
            })
        };
        let numbers: Vec<_> = running
            .into_stream(twice_or_never, |number, ()| number)
            .map(|message| message.expect("no error"))
            .collect()
            .await;
        assert_eq!(numbers, [0, 1, 2, 3]);
    }

    #[tokio::test]
    async fn an_error_while_replying_cancels_the_request() {
        let guard = Arc::new(());
        let running = running(vec![started()], open(guard.clone()));
        let refuse = |_| Err::<Vec<()>, _>(Error::invalid("max_bytes", "too many"));
        let mut messages = running.into_stream(refuse, |_, ()| ());
        let status = messages.next().await.expect("one").expect_err("refused");
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(Arc::strong_count(&guard), 1, "the request still runs");
        assert!(messages.next().await.is_none());
    }

    #[tokio::test]
    async fn a_caller_who_reads_nothing_holds_no_memory_past_its_deadline() {
        let guard = Arc::new(());
        let many = (0..100).map(|token| delta(&[token]));
        for end in [open(guard.clone()), stream::iter([end()]).boxed()] {
            let events = stream::iter([started()])
                .chain(stream::iter(many.clone()))
                .chain(end);
            let soon = call(Duration::from_millis(20));
            let tracker = TaskTracker::new();
            let stop = CancellationToken::new();
            let mut running = Running::new(events, admit_all, soon, stop, tracker.token());
            eventually(|| tracker.is_empty()).await;
            assert_eq!(Arc::strong_count(&guard), 1, "the request still runs");
            eventually(|| running.shared.state().told.len() == 1).await;
            let seen = all(&mut running).await;
            assert!(matches!(
                seen.as_slice(),
                [Err(Error::DeadlineExceeded {
                    tokens_done: 100,
                    ..
                })]
            ));
        }
    }

    #[tokio::test]
    async fn an_event_that_is_too_much_ends_the_request_though_nobody_reads() {
        let guard = Arc::new(());
        let events = stream::iter([started(), delta(&[1]), delta(&[2])]).chain(open(guard.clone()));
        let mut left = 1;
        let admit = move |event: &Event| {
            if matches!(event, Event::Delta(_)) {
                left -= 1;
            }
            match left {
                0.. => Ok(()),
                _ => Err(Error::invalid("max_bytes", "too many")),
            }
        };
        let in_flight = TaskTracker::new().token();
        let call = call(Duration::from_secs(60));
        let mut running = Running::new(events, admit, call, CancellationToken::new(), in_flight);
        eventually(|| Arc::strong_count(&guard) == 1).await;
        let seen = all(&mut running).await;
        assert!(matches!(
            seen.as_slice(),
            [
                Ok("started"),
                Ok("delta"),
                Err(Error::InvalidRequest { .. })
            ]
        ));
    }
}
