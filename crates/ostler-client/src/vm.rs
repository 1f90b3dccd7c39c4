//! VMs: life, actions, console, display, log.

use ostler_api::ByteSize;
use ostler_api::operation::Accepted;
use ostler_api::vm::{DiskBus, Vm, VmCreate, VmPatch};
use serde::Serialize;
use serde_json::json;

use crate::body::Body;
use crate::call::Call;
use crate::{Client, Delete, Result, Socket, Wait};

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    pub async fn vm_create(&self, create: &VmCreate, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.json(self.scoped::<Vm>(Call::post(&["vms"], create)?.wait(wait))).await
    }

    pub async fn vm_get(&self, vm: &str) -> Result<Vm> {
        self.get(vm).await
    }

    pub async fn vm_patch(&self, vm: &str, patch: &VmPatch, if_match: Option<u64>) -> Result<Vm> {
        self.patch(vm, patch, if_match).await
    }

    pub async fn vm_delete(&self, vm: &str, how: &Delete) -> Result<Accepted<Vm>> {
        self.json(self.deletion::<Vm>(vm, how)).await
    }

    pub async fn vm_start(&self, vm: &str, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "start", &json!({}), wait).await
    }

    /// The ACPI power button. After `timeout` seconds (the server's default when not given) it is forced off, unless
    /// `force` is false.
    pub async fn vm_shutdown(
        &self,
        vm: &str,
        timeout: Option<u32>,
        force: bool,
        wait: Option<&Wait>,
    ) -> Result<Accepted<Vm>> {
        let body = match timeout {
            Some(timeout) => json!({"timeout": timeout, "force": force}),
            None => json!({ "force": force }),
        };
        self.vm_act(vm, "shutdown", &body, wait).await
    }

    pub async fn vm_stop(&self, vm: &str, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "stop", &json!({}), wait).await
    }

    pub async fn vm_reset(&self, vm: &str, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "reset", &json!({}), wait).await
    }

    pub async fn vm_reboot(
        &self,
        vm: &str,
        timeout: Option<u32>,
        wait: Option<&Wait>,
    ) -> Result<Accepted<Vm>> {
        let body = timeout.map_or_else(|| json!({}), |timeout| json!({ "timeout": timeout }));
        self.vm_act(vm, "reboot", &body, wait).await
    }

    pub async fn vm_pause(&self, vm: &str, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "pause", &json!({}), wait).await
    }

    pub async fn vm_resume(&self, vm: &str, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "resume", &json!({}), wait).await
    }

    pub async fn vm_suspend(&self, vm: &str, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "suspend", &json!({}), wait).await
    }

    pub async fn vm_rebuild(
        &self,
        vm: &str,
        image: &str,
        disk: Option<ByteSize>,
        wait: Option<&Wait>,
    ) -> Result<Accepted<Vm>> {
        let body = match disk {
            Some(disk) => json!({"image": image, "disk": disk}),
            None => json!({ "image": image }),
        };
        self.vm_act(vm, "rebuild", &body, wait).await
    }

    /// Plugs a volume in, also while the VM runs.
    pub async fn vm_attach(
        &self,
        vm: &str,
        volume: &str,
        bus: DiskBus,
        wait: Option<&Wait>,
    ) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "attach", &json!({"volume": volume, "bus": bus}), wait).await
    }

    /// Takes a volume out; a running guest has to let it go.
    pub async fn vm_detach(&self, vm: &str, volume: &str, wait: Option<&Wait>) -> Result<Accepted<Vm>> {
        self.vm_act(vm, "detach", &json!({ "volume": volume }), wait).await
    }

    async fn vm_act(
        &self,
        vm: &str,
        action: &str,
        body: &impl Serialize,
        wait: Option<&Wait>,
    ) -> Result<Accepted<Vm>> {
        self.json(self.scoped::<Vm>(Call::post(&["vms", vm, "actions", action], body)?.wait(wait))).await
    }

    /// The serial console, both ways, after the last `scrollback` bytes that it printed.
    pub async fn vm_console(&self, vm: &str, scrollback: u64) -> Result<Socket> {
        let call = Call::get(&["vms", vm, "console"]).with("scrollback", &scrollback.to_string());
        self.socket(self.scoped::<Vm>(call)).await
    }

    /// The display: RFB in binary frames.
    pub async fn vm_vnc(&self, vm: &str) -> Result<Socket> {
        self.socket(self.scoped::<Vm>(Call::get(&["vms", vm, "vnc"]))).await
    }

    /// What the serial console printed; with `follow` also what it will print.
    pub async fn vm_log(&self, vm: &str, tail: Option<ByteSize>, follow: bool) -> Result<Body> {
        let mut call = Call::get(&["vms", vm, "log"]).with("follow", if follow { "true" } else { "false" });
        if let Some(tail) = tail {
            call = call.with("tail", &tail.bytes().to_string());
        }
        Ok(self.stream(self.scoped::<Vm>(call)).await?.into_body())
    }
}
