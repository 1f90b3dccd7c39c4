//! Progress on standard error: a bar on a terminal, plain lines elsewhere, nothing when it is quick.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ostler_api::ByteSize;
use ostler_api::operation::Progress as Step;

use super::output::note;
use super::text::clean;

pub(crate) enum Progress {
    Bar(ProgressBar),
    Plain(Plain),
}

pub(crate) struct Plain {
    title: String,
    stage: String,
    tenth: u64,
    began: Instant,
    said: Instant,
}

/// What is done sooner needs no lines.
const QUICK: Duration = Duration::from_secs(1);
/// Plain lines come at most this often within one stage.
const EVERY: Duration = Duration::from_secs(10);

impl Progress {
    pub(crate) fn new(title: &str) -> Self {
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(spinner());
            bar.set_message(clean(title).into_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
            Self::Bar(bar)
        } else {
            let now = Instant::now();
            Self::Plain(Plain {
                title: title.to_owned(),
                stage: String::new(),
                tenth: 0,
                began: now,
                said: now,
            })
        }
    }

    pub(crate) fn step(&mut self, step: &Step) {
        self.show(&step.stage, step.done, step.total);
    }

    /// `done` and `total` in bytes; a `total` of nothing is unknown.
    pub(crate) fn show(&mut self, stage: &str, done: u64, total: Option<u64>) {
        let total = total.filter(|total| *total > 0);
        match self {
            Self::Bar(bar) => {
                bar.set_prefix(clean(stage).into_owned());
                match total {
                    Some(total) => {
                        bar.set_style(sized());
                        bar.set_length(total);
                        bar.set_position(done.min(total));
                    }
                    None => {
                        bar.set_style(if done > 0 { counted() } else { spinner() });
                        bar.unset_length();
                        bar.set_position(done);
                    }
                }
            }
            Self::Plain(plain) => plain.show(stage, done, total),
        }
    }
}

impl Plain {
    fn show(&mut self, stage: &str, done: u64, total: Option<u64>) {
        let tenth = total.map_or(0, |total| u128::from(done.min(total)) * 10 / u128::from(total));
        let tenth = u64::try_from(tenth).unwrap_or(10);
        let new_stage = stage != self.stage;
        let moved = total.is_some() && tenth > self.tenth && self.said.elapsed() >= EVERY / 10;
        if self.began.elapsed() < QUICK || !new_stage && !moved && self.said.elapsed() < EVERY {
            return;
        }
        self.stage = stage.to_owned();
        self.tenth = tenth;
        self.said = Instant::now();
        note(&format!("{}: {}", self.title, line(stage, done, total)));
    }
}

fn line(stage: &str, done: u64, total: Option<u64>) -> String {
    match (done, total) {
        (0, None) => stage.to_owned(),
        (done, None) => format!("{stage}, {}", ByteSize(done)),
        (done, Some(total)) => {
            let percent = u128::from(done.min(total)) * 100 / u128::from(total.max(1));
            format!("{stage}, {percent}% of {}", ByteSize(total))
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        match self {
            Self::Bar(bar) => bar.finish_and_clear(),
            Self::Plain(_) => {}
        }
    }
}

// The templates are constants that a test goes through.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

const SPINNER: &str = "{spinner} {msg} {prefix} ({elapsed})";
const COUNTED: &str = "{spinner} {msg} {prefix} {binary_bytes} ({elapsed})";
const SIZED: &str = "{spinner} {msg} {prefix} [{bar:30}] {percent}% of {binary_total_bytes} {binary_bytes_per_sec} ({elapsed})";

fn spinner() -> ProgressStyle {
    style(SPINNER)
}

fn counted() -> ProgressStyle {
    style(COUNTED)
}

fn sized() -> ProgressStyle {
    style(SIZED).progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_well_formed() {
        for template in [SPINNER, COUNTED, SIZED] {
            assert!(ProgressStyle::with_template(template).is_ok());
        }
    }

    #[test]
    fn plain_lines_say_how_far_it_is() {
        assert_eq!(line("checking", 0, None), "checking");
        assert_eq!(line("uploading", 3 << 20, None), "uploading, 3 MiB");
        assert_eq!(line("uploading", 3 << 20, Some(4 << 20)), "uploading, 75% of 4 MiB");
    }
}
