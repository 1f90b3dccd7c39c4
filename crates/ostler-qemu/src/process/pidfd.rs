//! A process that cannot be mistaken for another, and its end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::machine::ExitReason;

#[derive(Debug, Clone)]
pub(crate) struct Pidfd {
    fd: Arc<OwnedFd>,
    pid: u32,
}

impl Pidfd {
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let target = raw.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(Self { fd: Arc::new(pidfd_open(target, PidfdFlags::empty())?), pid })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills; that the process has already ended is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&*self.fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the end, and reaps the process when it is a child of ours.
    async fn wait(&self) -> ExitReason {
        // SAFETY: the Arc keeps the descriptor open and the same for as long as the registration lives.
        match unsafe { AsyncFd::register_with_interest(Arc::clone(&self.fd), Interest::READABLE) } {
            // The pidfd becomes readable when the process has ended and stays so.
            Ok(ready) => drop(ready.readable().await),
            Err(error) => {
                tracing::error!(pid = self.pid, %error, "a pidfd cannot be watched, so it is polled");
                while !self.has_ended() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
        self.reap()
    }

    fn has_ended(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&*self.fd, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    fn reap(&self) -> ExitReason {
        match waitid(WaitId::PidFd(self.fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(0), _) => ExitReason::Clean,
                (Some(code), _) => ExitReason::Code(code),
                (None, Some(signal)) => ExitReason::Signal(signal),
                (None, None) => ExitReason::Unknown,
            },
            Ok(None) | Err(_) => ExitReason::Unknown,
        }
    }

    /// Watches the process from now on; `on_end` is called after the end was made known.
    pub(crate) fn watch(
        &self,
        patience: Patience,
        on_end: impl FnOnce() + Send + 'static,
    ) -> watch::Receiver<Option<ExitReason>> {
        let (ended, receiver) = watch::channel(None);
        let pidfd = self.clone();
        tokio::spawn(async move {
            let unwanted = async {
                match patience {
                    Patience::UntilItEnds => std::future::pending().await,
                    Patience::WhileWanted => ended.closed().await,
                }
            };
            let reason = tokio::select! {
                reason = pidfd.wait() => reason,
                () = unwanted => return,
            };
            ended.send_replace(Some(reason));
            on_end();
        });
        receiver
    }
}

/// How long a process is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// A child must be reaped.
    UntilItEnds,
    /// As long as anybody waits for the news.
    WhileWanted,
}
