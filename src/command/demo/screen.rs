//! What the demo shows: lines, and on a terminal a status line below them that moves.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::command::answer;

/// Where the demo writes.
pub(super) struct Screen {
    began: Instant,
    /// The status line of a terminal.
    bar: Option<ProgressBar>,
}

impl Screen {
    /// A screen with a moving status line, or plain lines only.
    pub(super) fn new(plain: bool) -> Self {
        let bar = (!plain).then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self {
            began: Instant::now(),
            bar,
        }
    }

    /// Whether the demo runs on a terminal.
    pub(super) fn is_terminal() -> bool {
        std::io::stdout().is_terminal()
    }

    /// A line that stays.
    pub(super) fn line(&self, text: &str) {
        let text = format!("{:>6.1}s  {text}", self.began.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(text),
            None => answer(&format!("{text}\n")),
        }
    }

    /// How things stand: the moving line on a terminal, a line of its own elsewhere.
    pub(super) fn status(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None => self.line(text),
        }
    }

    /// The last line, without a time.
    pub(super) fn end(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        answer(&format!("{text}\n"));
    }
}
