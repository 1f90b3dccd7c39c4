//! The layout of the workspace: its dependency arrows are those of the table in `docs/architecture.md`, and `ostler-api` does no
//! I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// Everything that `ostler-api` may use outside the workspace: values, text, descriptions. Nothing that opens a file,
/// a socket or a thread.
const API_MAY_USE: [&str; 6] = ["jiff", "serde", "serde_json", "thiserror", "utoipa", "uuid"];

type Names = BTreeSet<String>;

/// What one crate may depend on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Row {
    /// In the workspace, always.
    normal: Names,
    /// In the workspace, in its tests as well.
    tests: Names,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

/// The names in backticks within a cell.
fn names(cell: &str) -> Names {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The table under "Crates" whose rows begin with a crate's name.
fn law(page: &str) -> BTreeMap<String, Row> {
    let section =
        page.split("\n## ").find(|section| section.starts_with("Crates\n")).expect("a section on crates");
    section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
            let [name, normal, tests] = cells.as_slice() else { panic!("three cells: {line}") };
            let name = names(name).pop_first().expect("a crate's name");
            (name, Row { normal: names(normal), tests: names(tests) })
        })
        .collect()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no text {key} in {value}"))
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("no list {key} in {value}"))
}

#[test]
fn every_arrow_is_in_the_architecture() {
    let metadata = metadata();
    let packages = list(&metadata, "packages");
    let law = law(&std::fs::read_to_string(root().join("docs/architecture.md")).expect("the page"));
    let members: Names = packages.iter().map(|package| text(package, "name").to_owned()).collect();
    assert_eq!(members, law.keys().cloned().collect::<Names>(), "the crates and the rows of the table");

    let mut wrong = Vec::new();
    for package in packages {
        let name = text(package, "name");
        let row = &law[name];
        for dependency in list(package, "dependencies") {
            let on = text(dependency, "name");
            if !members.contains(on) {
                continue;
            }
            let in_tests = dependency["kind"] == "dev";
            let allowed = row.normal.contains(on) || (in_tests && row.tests.contains(on));
            if !allowed {
                let kind = if in_tests { " in its tests" } else { "" };
                wrong.push(format!("{name} depends on {on}{kind}"));
            }
        }
    }
    assert!(wrong.is_empty(), "not in the table of docs/architecture.md: {}", wrong.join("; "));
}

#[test]
fn the_table_points_down_only() {
    let mut law = law(&std::fs::read_to_string(root().join("docs/architecture.md")).expect("the page"));
    // Whoever depends on nothing that is left is taken out; a circle stays.
    while !law.is_empty() {
        let free: Vec<String> = law
            .iter()
            .filter(|(_, row)| row.normal.iter().all(|on| !law.contains_key(on)))
            .map(|(name, _)| name.clone())
            .collect();
        assert!(!free.is_empty(), "a circle among {:?}", law.keys().collect::<Vec<_>>());
        free.iter().for_each(|name| drop(law.remove(name)));
    }
}

#[test]
fn the_api_types_do_no_io() {
    let metadata = metadata();
    let api = list(&metadata, "packages")
        .iter()
        .find(|package| package["name"] == "ostler-api")
        .expect("the crate of the API's types");
    for dependency in list(api, "dependencies").iter().filter(|dependency| dependency["kind"] != "dev") {
        let name = text(dependency, "name");
        assert!(
            API_MAY_USE.contains(&name),
            "ostler-api depends on {name}: if it does no I/O, add it to API_MAY_USE in this test; else it belongs elsewhere"
        );
    }
}
