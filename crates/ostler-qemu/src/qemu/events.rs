//! QMP's events as ours. Pure.

use serde_json::Value;

use crate::args::names;
use crate::machine::MachineEvent;
use crate::text::clean;

/// None for events the agent has no use for.
pub(super) fn translate(name: &str, data: &Value) -> Option<MachineEvent> {
    let by_guest = || data["guest"].as_bool().unwrap_or(false);
    match name {
        "STOP" => Some(MachineEvent::Paused),
        "RESUME" => Some(MachineEvent::Resumed),
        "RESET" => Some(MachineEvent::Reset { guest: by_guest() }),
        "SHUTDOWN" => Some(MachineEvent::Shutdown { guest: by_guest() }),
        "POWERDOWN" => Some(MachineEvent::Powerdown),
        "GUEST_PANICKED" => Some(MachineEvent::Panicked),
        "BLOCK_IO_ERROR" => Some(MachineEvent::IoError {
            disk: disk_id(data["node-name"].as_str().unwrap_or_default()),
            reason: clean(data["reason"].as_str().unwrap_or("unknown"), 256),
            nospace: data["nospace"].as_bool().unwrap_or(false),
        }),
        _ => None,
    }
}

fn disk_id(node: &str) -> String {
    clean(names::owner(node).map_or(node, |owner| owner.disk), 64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_of_interest_are_translated() {
        assert_eq!(translate("STOP", &Value::Null), Some(MachineEvent::Paused));
        assert_eq!(translate("RESET", &json!({"guest": true})), Some(MachineEvent::Reset { guest: true }));
        assert_eq!(translate("SHUTDOWN", &json!([1])), Some(MachineEvent::Shutdown { guest: false }));
        assert_eq!(translate("RTC_CHANGE", &json!({"offset": 1})), None);
        assert_eq!(
            translate(
                "BLOCK_IO_ERROR",
                &json!({"node-name": "blk-root-l1", "nospace": true, "reason": "No space\u{7}"})
            ),
            Some(MachineEvent::IoError { disk: "root".into(), reason: "No space ".into(), nospace: true })
        );
    }
}
