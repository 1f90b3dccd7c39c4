//! Paths and query strings.

use std::fmt::Write as _;

use serde::Serialize;

use crate::{ClientError, Result};

/// `/v1/vms/web-1`, with whatever is in a segment escaped.
pub(crate) fn path(segments: &[&str]) -> String {
    let mut path = String::from("/v1");
    for segment in segments {
        path.push('/');
        // A segment of dots would be a walk through the tree.
        if segment.chars().all(|c| c == '.') {
            path.extend(std::iter::repeat_n("%2E", segment.len()));
        } else {
            escape(segment, &mut path);
        }
    }
    path
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Query(String);

impl Query {
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.0.push(if self.0.is_empty() { '?' } else { '&' });
        escape(key, &mut self.0);
        self.0.push('=');
        escape(value, &mut self.0);
    }

    /// A flat struct's fields; those that are null are left out.
    pub(crate) fn of(params: &impl Serialize) -> Result<Self> {
        let fail = |what: &str| ClientError::Protocol(format!("cannot write the query: {what}"));
        let mut query = Self::default();
        let serde_json::Value::Object(fields) =
            serde_json::to_value(params).map_err(|e| fail(&e.to_string()))?
        else {
            return Err(fail("not a set of fields"));
        };
        for (key, value) in fields {
            match value {
                serde_json::Value::Null => {}
                serde_json::Value::String(text) => query.set(&key, &text),
                other => query.set(&key, &other.to_string()),
            }
        }
        Ok(query)
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

fn escape(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ostler_api::list::ListParams;

    #[test]
    fn nothing_in_a_name_leaves_its_segment() {
        assert_eq!(path(&["vms", "a/b?c#d"]), "/v1/vms/a%2Fb%3Fc%23d");
        assert_eq!(path(&["vms", ".."]), "/v1/vms/%2E%2E");
    }

    #[test]
    fn params_become_pairs() {
        let params = ListParams {
            label: Some("a=b,!c".to_owned()),
            limit: Some(3),
            watch: Some(true),
            ..ListParams::default()
        };
        assert_eq!(Query::of(&params).unwrap().as_str(), "?label=a%3Db%2C%21c&limit=3&watch=true");
        assert_eq!(Query::default().as_str(), "");
    }
}
