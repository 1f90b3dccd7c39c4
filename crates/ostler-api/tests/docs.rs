//! The tables of the documentation against the code: which action is taken in which phase, which error has which status.

use std::collections::BTreeMap;

use ostler_api::vm_action::{Decision, VmAction, decide};
use ostler_api::vm_phase::VmPhase;
use ostler_api::{ErrorCode, VolumeId};

/// The cells of the table whose first column is headed `head`, row by row, with its header first.
fn table(page: &str, head: &str) -> Vec<Vec<String>> {
    let begin = format!("| {head} |");
    let rows =
        page.lines().skip_while(|line| !line.starts_with(&begin)).take_while(|line| line.starts_with('|'));
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    rows.filter(|line| !line.starts_with("|---")).map(cells).collect()
}

fn actions() -> BTreeMap<&'static str, VmAction> {
    let all = [
        VmAction::Start,
        VmAction::Shutdown { timeout: 90, force: true },
        VmAction::Stop,
        VmAction::Reset,
        VmAction::Reboot { timeout: 90 },
        VmAction::Pause,
        VmAction::Resume,
        VmAction::Suspend,
        VmAction::Rebuild { volume: VolumeId::new() },
        VmAction::Attach { volume: VolumeId::new() },
        VmAction::Detach { volume: VolumeId::new() },
        VmAction::Delete,
    ];
    all.into_iter().map(|action| (action.name(), action)).collect()
}

#[test]
fn actions_and_phases_are_as_documented() {
    let rows = table(include_str!("../../../docs/vm.md"), "action");
    let (header, rows) = rows.split_first().expect("a table of actions");
    let phases: Vec<VmPhase> = header[1..].iter().map(|word| word.parse().expect("a phase")).collect();
    let settled = VmPhase::ALL.iter().filter(|phase| phase.is_settled()).count();
    assert_eq!(phases.len(), settled, "every phase in which nothing is in progress");

    let mut actions = actions();
    for row in rows {
        let action = actions.remove(row[0].as_str()).unwrap_or_else(|| panic!("{} is no action", row[0]));
        for (phase, written) in phases.iter().zip(&row[1..]) {
            let true_word = match decide(&action, *phase, None) {
                Decision::Accept => "yes",
                Decision::Already => "is so",
                Decision::Refuse { .. } => "-",
                Decision::Join(_) => unreachable!("nothing is in progress"),
            };
            assert_eq!(written, true_word, "{} while {phase}, in docs/vm.md", row[0]);
        }
    }
    assert!(actions.is_empty(), "not in docs/vm.md: {:?}", actions.keys());
}

#[test]
fn errors_are_as_documented() {
    let rows = table(include_str!("../../../docs/api.md"), "code");
    let written: BTreeMap<String, u16> = rows[1..]
        .iter()
        .map(|row| (row[0].trim_matches('`').to_owned(), row[1].parse().expect("a status")))
        .collect();
    let known: BTreeMap<String, u16> =
        ErrorCode::ALL.iter().map(|code| (code.as_str().to_owned(), code.status())).collect();
    assert_eq!(written, known, "the table of codes in docs/api.md");
}
