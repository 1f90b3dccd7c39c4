//! `ostler vm console` and `ostler vm log`: a guest's serial port on this terminal.

mod input;
mod raw;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use http_body_util::BodyExt;
use ostler_api::ByteSize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::args::duration;
use super::error::{CliError, Doing, Exit, Result};
use super::output::{note_raw, output_error, write_bytes};
use super::session::Session;
use super::text::LogFilter;
use super::vm::size;
use input::{Ended, Input};
use raw::RawTerminal;

pub(super) const CONSOLE_EXAMPLES: &str = "\
On a terminal every key goes to the guest, ctrl-c too; ctrl-] leaves. Several people may use one console at once.
Without a terminal standard input is sent to the guest; after its end the console is left once the guest is silent.

Examples:
  ostler vm console web
  echo reboot | ostler vm console web --linger 5
  ostler vm console web --no-stdin > boot.txt";

#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// Name or id
    vm: String,

    /// How much of what was shown before to show first
    #[arg(long, value_parser = size, default_value = "16K", value_name = "SIZE")]
    scrollback: ByteSize,

    /// Only watch
    #[arg(long)]
    no_stdin: bool,

    /// After the end of standard input, leave when the guest is silent for this long
    #[arg(long, value_parser = duration, default_value = "2s", value_name = "TIME")]
    linger: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// Name or id
    vm: String,

    /// Go on as the guest prints more, until it is interrupted
    #[arg(short, long)]
    follow: bool,

    /// Only the last bytes, such as 4K
    #[arg(long, value_parser = size, value_name = "SIZE")]
    tail: Option<ByteSize>,

    /// Let all control sequences through to the terminal; without a terminal they always are
    #[arg(long)]
    raw: bool,
}

pub(crate) async fn log(session: &Session, args: &LogArgs) -> Result<()> {
    let doing = || format!("cannot show the log of vm {}", args.vm);
    let mut body = session.client.vm_log(&args.vm, args.tail, args.follow).await.doing(doing)?;
    let mut filter = (!args.raw && std::io::stdout().is_terminal()).then(LogFilter::default);
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|e| CliError::failed("the connection broke").why(e.to_string())).doing(doing)?;
        if let Ok(data) = frame.into_data() {
            match &mut filter {
                Some(filter) => write_bytes(&filter.feed(&data))?,
                None => write_bytes(&data)?,
            }
        }
    }
    Ok(())
}

/// Why a console was left.
enum Left {
    Escape,
    ClosedByServer,
    Silent,
    Signal(u8),
}

pub(crate) async fn console(session: &Session, args: &ConsoleArgs) -> Result<()> {
    let doing = || format!("cannot use the console of vm {}", args.vm);
    let socket = session.client.vm_console(&args.vm, args.scrollback.bytes()).await.doing(doing)?;
    let (sender, mut receiver) = socket.split();
    let keys = !args.no_stdin && std::io::stdin().is_terminal();
    // Signals first: from here on the terminal is always put right.
    let mut signals = Signals::new()?;
    let terminal = if keys { Some(RawTerminal::enter().doing(doing)?) } else { None };
    let end = if keys { "\r\n" } else { "\n" };
    let leave = if keys { "ctrl-] leaves" } else { "ctrl-c leaves" };
    if std::io::stderr().is_terminal() {
        note_raw(&format!("[console of {}; {leave}]{end}", super::text::clean(&args.vm)));
    }
    let mut input = if args.no_stdin { Input::none(sender) } else { Input::stdin(sender, keys) };
    let mut silent_since: Option<Instant> = None;
    let left = loop {
        let patience = silent_since.map_or_else(far, |since| since + args.linger);
        tokio::select! {
            bytes = receiver.recv() => match bytes.doing(doing)? {
                None => break Left::ClosedByServer,
                Some(bytes) => {
                    write_bytes(&bytes)?;
                    if silent_since.is_some() {
                        silent_since = Some(Instant::now());
                    }
                }
            },
            ended = input.ended() => match ended {
                Ended::Escape => break Left::Escape,
                Ended::Input => silent_since = Some(Instant::now()),
                Ended::Broken(error) => return Err(CliError::from(error)).doing(doing),
            },
            () = sleep_until(patience) => break Left::Silent,
            number = signals.next() => break Left::Signal(number),
        }
    };
    drop(terminal);
    match left {
        Left::Escape => {
            farewell("left the console");
            Ok(())
        }
        Left::Silent => Ok(()),
        Left::ClosedByServer => {
            farewell("the console was closed: the VM stopped, or its node let go");
            Ok(())
        }
        Left::Signal(number) => {
            farewell("interrupted");
            Err(CliError::quiet(Exit::Signal(number)))
        }
    }
}

/// When nothing is waited for.
fn far() -> Instant {
    Instant::now() + Duration::from_secs(86_400)
}

fn farewell(text: &str) {
    let mut out = std::io::stdout();
    if out.is_terminal() {
        // Colours and a hidden cursor of the guest's end here.
        let _ = out.write_all(b"\x1b[0m\x1b[?25h").and_then(|()| out.flush()).map_err(output_error);
    }
    if std::io::stderr().is_terminal() {
        note_raw(&format!("\n[{text}]\n"));
    }
}

/// What would end us and leave the terminal as it is.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let open =
            |kind| signal(kind).map_err(|e| CliError::failed("cannot take signals").why(e.to_string()));
        Ok(Self {
            interrupt: open(SignalKind::interrupt())?,
            terminate: open(SignalKind::terminate())?,
            hangup: open(SignalKind::hangup())?,
            quit: open(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hangup.recv() => 1,
            _ = self.quit.recv() => 3,
        }
    }
}
