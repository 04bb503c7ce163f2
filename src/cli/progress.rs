//! Shows how far a long command is: a bar on a terminal, a log line for each tenth elsewhere.

use std::io::{IsTerminal, stderr};

use indicatif::{ProgressBar, ProgressStyle};

pub(super) struct Progress {
    what: &'static str,
    bar: Option<ProgressBar>,
    tenths: usize,
}

impl Progress {
    /// `what` is counted, e.g. `answers`.
    pub(super) fn new(what: &'static str) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = "{msg} {wide_bar} {pos}/{len} {per_sec} ETA {eta}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.with_message(what)
        });
        Self {
            what,
            bar,
            tenths: 0,
        }
    }

    pub(super) fn tick(&mut self, done: usize, total: usize) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
            }
            None => {
                if let Some(tenths) = tenths_reached(self.tenths, done, total) {
                    tracing::info!("{}: {done} of {total}", self.what);
                    self.tenths = tenths;
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The tenths that are done now, when they are more than before; a new run starts over.
fn tenths_reached(before: usize, done: usize, total: usize) -> Option<usize> {
    let now = done * 10 / total.max(1);
    (now > before || (now < before && now > 0)).then_some(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tenth_is_told_once() {
        let mut tenths = 0;
        let mut told = 0;
        for done in 1..=95 {
            if let Some(now) = tenths_reached(tenths, done, 95) {
                tenths = now;
                told += 1;
            }
        }
        assert_eq!((tenths, told), (10, 10));
    }

    #[test]
    fn a_second_file_is_told_about_too() {
        assert_eq!(tenths_reached(10, 1, 100), None);
        assert_eq!(tenths_reached(10, 10, 100), Some(1));
    }
}
