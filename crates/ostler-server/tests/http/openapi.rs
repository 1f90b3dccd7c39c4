//! The OpenAPI document is part of the public interface: a change of it is a change of a file that is reviewed.
//!
//! `OSTLER_BLESS=1 cargo nextest run -p ostler-server --test http openapi` writes the file anew.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

fn document() -> Value {
    serde_json::from_str(&ostler_server::openapi_json()).unwrap()
}

/// Path, method, operation.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            found.push((path.clone(), method.clone(), operation.clone()));
        }
    }
    found
}

#[test]
fn the_snapshot_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let now = ostler_server::openapi_json();
    if std::env::var_os("OSTLER_BLESS").is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    if kept == now {
        return;
    }
    let difference = kept.lines().zip(now.lines()).enumerate().find(|(_, (kept, now))| kept != now);
    panic!(
        "the API has changed, first at {difference:?}; if that is meant, run with OSTLER_BLESS=1 and commit openapi.json"
    );
}

#[test]
fn every_operation_says_what_it_is() {
    let document = document();
    let operations = operations(&document);
    assert!(operations.len() > 40, "{}", operations.len());
    let mut ids = BTreeSet::new();
    for (path, method, operation) in &operations {
        let what = format!("{method} {path}");
        assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{what} has no summary");
        assert_eq!(operation["tags"].as_array().map(Vec::len), Some(1), "{what} has one tag");
        assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{what}: its id is taken");
        let described = operation["parameters"].as_array().cloned().unwrap_or_default();
        let mut names = BTreeSet::new();
        for parameter in &described {
            assert!(parameter["description"].is_string(), "{what}: {parameter} has no description");
            assert!(names.insert(parameter["name"].to_string()), "{what}: {parameter} is there twice");
        }
        let in_path = path.matches('{').count();
        assert_eq!(described.iter().filter(|p| p["in"] == "path").count(), in_path, "{what}");
        if path != "/healthz" {
            let problem =
                &operation["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{what}");
        }
    }
}

#[test]
fn only_four_routes_are_public() {
    let public: Vec<String> = operations(&document())
        .into_iter()
        .filter(|(_, _, operation)| operation["security"] == serde_json::json!([{}]))
        .map(|(path, _, _)| path)
        .collect();
    assert_eq!(public, ["/healthz", "/readyz", "/v1/openapi.json", "/v1/version"]);
}

#[test]
fn every_reference_leads_somewhere() {
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    match (key.as_str(), value) {
                        ("$ref", Value::String(to)) => drop(found.insert(to.clone())),
                        _ => references(value, found),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    assert!(found.len() > 30);
    for to in found {
        let pointer = to.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{to} leads nowhere");
    }
}
