//! The hypervisor's entry points, and the one place that knows which machines this agent holds.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

use super::bring_up::bring_up;
use super::launch::{LaunchContext, Permission, launch};
use super::machine::{KILL_DEADLINE, QemuMachine};
use super::probe::{Capabilities, capabilities, host_probe};
use super::survey::{Adopted, Found, adopt, look};
use super::users::Users;
use crate::args::validate;
use crate::config::QemuConfig;
use crate::error::{Error, Result, StartError};
use crate::files::on_own_thread;
use crate::host::HostProbe;
use crate::machine::{Hypervisor, Machine, Survey};
use crate::process::pidfd::Patience;
use crate::rundir::{self, RunDir};
use crate::spec::{MachineSpec, StartOptions};

/// Real QEMU machines on this host. Cloning gives another handle to the same.
#[derive(Debug, Clone)]
pub struct QemuHypervisor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    launch: LaunchContext,
    capabilities: tokio::sync::Mutex<Option<Arc<Capabilities>>>,
    known: Mutex<Known>,
    /// Adopting takes QEMU's only monitor connection, so one survey at a time.
    surveying: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Known {
    machines: HashMap<Uuid, Arc<QemuMachine>>,
    starting: HashSet<Uuid>,
}

/// Marks a machine as being started for as long as it lives.
struct Starting {
    inner: Arc<Inner>,
    id: Uuid,
}

impl Starting {
    fn begin(inner: &Arc<Inner>, id: Uuid) -> Result<Self, StartError> {
        let mut known = inner.known.lock();
        let living =
            known.machines.get(&id).filter(|machine| !machine.has_ended()).map(|machine| machine.pid());
        if let Some(pid) = living {
            return Err(StartError::AlreadyRunning { id, pid });
        }
        if !known.starting.insert(id) {
            return Err(StartError::StartUnderWay { id });
        }
        Ok(Self { inner: Arc::clone(inner), id })
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.inner.known.lock().starting.remove(&self.id);
    }
}

impl QemuHypervisor {
    pub fn new(config: QemuConfig) -> Self {
        let users = Users::new(config.user);
        let inner = Inner {
            launch: LaunchContext { config, users },
            capabilities: tokio::sync::Mutex::default(),
            known: Mutex::default(),
            surveying: tokio::sync::Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }
}

impl Inner {
    fn config(&self) -> &QemuConfig {
        &self.launch.config
    }

    async fn capabilities(&self) -> Result<Arc<Capabilities>, StartError> {
        let mut known = self.capabilities.lock().await;
        let found = capabilities(self.config(), known.clone()).await?;
        *known = Some(Arc::clone(&found));
        Ok(found)
    }

    fn living(&self, id: Uuid) -> Option<Arc<QemuMachine>> {
        self.known.lock().machines.get(&id).filter(|machine| !machine.has_ended()).cloned()
    }

    fn make_run_dir(&self) -> Result<(), StartError> {
        let run_dir = &self.config().run_dir;
        std::fs::create_dir_all(run_dir)
            .map_err(StartError::io(format!("making the run directory '{}'", run_dir.display())))
    }

    async fn start(
        self: Arc<Self>,
        spec: MachineSpec,
        opts: StartOptions,
    ) -> Result<Arc<QemuMachine>, StartError> {
        let _starting = Starting::begin(&self, spec.id)?;
        self.make_run_dir()?;
        let host = self.capabilities().await?;
        let permission = Arc::new(Permission::default());
        let (inner, work_spec, work_opts, may) =
            (Arc::clone(&self), spec.clone(), opts.clone(), Arc::clone(&permission));
        let mut work = Box::pin(on_own_thread("start-machine", move || {
            launch(&inner.launch, &host, &work_spec, &work_opts, &may)
        }));
        let limit = self.config().start_timeout;
        let launched = match timeout(limit, &mut work).await {
            Ok(launched) => launched,
            Err(_) if permission.withdraw() => {
                let last_words = "the machine's files did not open: does their disk answer?".into();
                return Err(StartError::Timeout { after: limit, last_words });
            }
            Err(_) => work.await,
        };
        let launched = launched.map_err(StartError::io("starting the machine"))??;
        let machine = bring_up(self.config(), launched, &spec, &opts).await?;
        self.known.lock().machines.insert(spec.id, Arc::clone(&machine));
        Ok(machine)
    }

    /// None when there is nothing to tell: gone, or being started by us.
    async fn survey_one(self: Arc<Self>, id: Uuid) -> Result<Option<Survey>> {
        let held = |inner: &Self| inner.living(id).map(|machine| Survey::Running(machine));
        if let Some(running) = held(&self) {
            return Ok(Some(running));
        }
        let run_dir = self.config().run_dir.clone();
        let found = on_own_thread("survey", move || look(&run_dir, id))
            .await
            .map_err(Error::io("looking into", RunDir::path_of(&self.config().run_dir, id)))??;
        // A start may have ended or begun while we looked.
        if let Some(running) = held(&self) {
            return Ok(Some(running));
        }
        if self.known.lock().starting.contains(&id) {
            return Ok(None);
        }
        let (dir, pidfd) = match found {
            Found::Nothing => return Ok(None),
            Found::Dead { last_words } => return Ok(Some(Survey::Dead { id, last_words })),
            Found::Alive { dir, pidfd } => (dir, pidfd),
        };
        let pid = pidfd.pid();
        Ok(Some(match adopt(self.config(), dir, pidfd).await {
            Adopted::Machine(machine) => {
                self.known.lock().machines.insert(id, Arc::clone(&machine));
                Survey::Running(machine)
            }
            Adopted::HalfStarted => Survey::HalfStarted { id, pid },
            Adopted::Unresponsive(reason) => Survey::Unresponsive { id, pid, reason },
            Adopted::Dead(last_words) => Survey::Dead { id, last_words },
        }))
    }

    fn forget(&self, id: Uuid) -> Result<()> {
        let Some(dir) = RunDir::open(&self.config().run_dir, id)? else { return Ok(()) };
        if !dir.lock_in_place()? {
            return Ok(());
        }
        if let Some(living) = dir.holder()? {
            dir.unlock();
            return Err(Error::StillRunning { id, pid: living.pid() });
        }
        dir.destroy()?;
        self.known.lock().machines.remove(&id);
        self.launch.users.release(id);
        Ok(())
    }
}

#[async_trait]
impl Hypervisor for QemuHypervisor {
    async fn probe(&self) -> HostProbe {
        let found = self.inner.capabilities().await;
        host_probe(found.as_deref())
    }

    async fn start(&self, spec: MachineSpec, opts: StartOptions) -> Result<Arc<dyn Machine>, StartError> {
        validate(&spec)?;
        // A task of its own: a caller that goes away must not leave a machine half made.
        let started = tokio::spawn(Arc::clone(&self.inner).start(spec, opts)).await;
        let machine = started.map_err(|error| StartError::io("starting the machine")(error.into()))??;
        Ok(machine)
    }

    async fn survey(&self) -> Result<Vec<Survey>> {
        let _turn = self.inner.surveying.lock().await;
        let run_dir = self.inner.config().run_dir.clone();
        let listed = on_own_thread("survey", move || rundir::list(&run_dir)).await;
        let ids = listed.map_err(Error::io("listing", &self.inner.config().run_dir))??;
        let mut looks = JoinSet::new();
        let mut found = Vec::with_capacity(ids.len());
        let mut collect = |done: Result<Result<Option<Survey>>, tokio::task::JoinError>| -> Result<()> {
            match done {
                Ok(Ok(one)) => found.extend(one),
                Ok(Err(error)) => return Err(error),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
            Ok(())
        };
        const AT_ONCE: usize = 32;
        for id in ids {
            if looks.len() >= AT_ONCE
                && let Some(done) = looks.join_next().await
            {
                collect(done)?;
            }
            looks.spawn(Arc::clone(&self.inner).survey_one(id));
        }
        while let Some(done) = looks.join_next().await {
            collect(done)?;
        }
        found.sort_by_key(Survey::id);
        Ok(found)
    }

    async fn forget(&self, id: Uuid) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        let done = on_own_thread("forget", move || inner.forget(id)).await;
        done.map_err(Error::io("removing", RunDir::path_of(&self.inner.config().run_dir, id)))?
    }

    async fn kill(&self, id: Uuid) -> Result<()> {
        if let Some(machine) = self.inner.living(id) {
            return machine.kill(KILL_DEADLINE).await;
        }
        let run_dir = self.inner.config().run_dir.clone();
        let found = on_own_thread("kill", move || look(&run_dir, id)).await;
        let found =
            found.map_err(Error::io("looking into", RunDir::path_of(&self.inner.config().run_dir, id)))??;
        let Found::Alive { pidfd, dir } = found else { return Ok(()) };
        let pid = pidfd.pid();
        let mut ended = pidfd.watch(Patience::WhileWanted, || ());
        pidfd.kill().map_err(Error::io("killing the process of", dir.file("")))?;
        let over = timeout(KILL_DEADLINE, ended.wait_for(Option::is_some)).await;
        over.map(drop).map_err(|_| Error::Unkillable {
            id,
            pid,
            after: Duration::from_secs(KILL_DEADLINE.as_secs()),
        })
    }
}
