//! Lists and watches.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::metadata::Labels;

pub const PAGE_DEFAULT: usize = 500;
pub const PAGE_MAX: usize = 10_000;

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct List<T> {
    pub items: Vec<T>,
    /// The state it shows; watch from `revision + 1` to miss nothing.
    pub revision: u64,
    /// Pass as `after` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Filters of a list or watch. All that are given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListParams {
    /// Project; the caller's own when not given. `*` for all that the caller may see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// Exact name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Label selector: `key=value`, `key!=value`, `key` (is there), `!key` (is not), separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Phases, separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Node's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Most items on a page (1–10000; 500 when not given).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// The `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Stream changes as JSON lines and do not list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch: Option<bool>,
    /// First revision to watch. Without it, the present state comes first as `added`, then `synced`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
}

/// One line of a watch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WatchLine<T> {
    Added {
        object: T,
    },
    Modified {
        object: T,
    },
    /// The last state before it was gone, or before it left the filter.
    Deleted {
        object: T,
    },
    /// All of the present state has been sent.
    Synced {
        revision: u64,
    },
    /// Nothing happened, the connection lives; resume from `revision + 1`.
    Bookmark {
        revision: u64,
    },
    /// The watch ends; list again.
    Error {
        problem: crate::Problem,
    },
}

/// A parsed label selector.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Requirement>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    Equals(String, String),
    Differs(String, String),
    Present(String),
    Absent(String),
}

impl LabelSelector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| match requirement {
            Requirement::Equals(key, value) => labels.get(key) == Some(value),
            Requirement::Differs(key, value) => labels.get(key) != Some(value),
            Requirement::Present(key) => labels.contains_key(key),
            Requirement::Absent(key) => !labels.contains_key(key),
        })
    }
}

impl std::str::FromStr for LabelSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut requirements = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let requirement = if let Some((key, value)) = part.split_once("!=") {
                Requirement::Differs(key.trim().to_owned(), value.trim().to_owned())
            } else if let Some((key, value)) = part.split_once('=') {
                Requirement::Equals(key.trim().to_owned(), value.trim().to_owned())
            } else if let Some(key) = part.strip_prefix('!') {
                Requirement::Absent(key.trim().to_owned())
            } else {
                Requirement::Present(part.to_owned())
            };
            let key = match &requirement {
                Requirement::Equals(key, _) | Requirement::Differs(key, _) => key,
                Requirement::Present(key) | Requirement::Absent(key) => key,
            };
            if key.is_empty() {
                return Err(format!("{part:?} has no label key"));
            }
            requirements.push(requirement);
        }
        Ok(Self(requirements))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_select() {
        let labels: Labels = [("tier".to_owned(), "web".to_owned())].into();
        for (text, hit) in [
            ("", true),
            ("tier", true),
            ("tier=web", true),
            ("tier=db", false),
            ("tier!=db,tier", true),
            ("!tier", false),
            ("!x, tier = web", true),
        ] {
            assert_eq!(text.parse::<LabelSelector>().unwrap().matches(&labels), hit, "{text:?}");
        }
        assert!("=x".parse::<LabelSelector>().is_err());
    }
}
