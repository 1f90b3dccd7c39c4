//! What all resources have in common, for code that handles them alike (store keys, caches, lists).

use std::fmt;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Metadata;

/// The kinds of resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Project,
    Node,
    Image,
    Volume,
    Snapshot,
    Vm,
    Operation,
    Event,
    Token,
}

impl Kind {
    pub const ALL: [Self; 9] = [
        Self::Project,
        Self::Node,
        Self::Image,
        Self::Volume,
        Self::Snapshot,
        Self::Vm,
        Self::Operation,
        Self::Event,
        Self::Token,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Project => "project",
            Self::Node => "node",
            Self::Image => "image",
            Self::Volume => "volume",
            Self::Snapshot => "snapshot",
            Self::Vm => "vm",
            Self::Operation => "operation",
            Self::Event => "event",
            Self::Token => "token",
        }
    }

    /// The word in URLs.
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Project => "projects",
            Self::Node => "nodes",
            Self::Image => "images",
            Self::Volume => "volumes",
            Self::Snapshot => "snapshots",
            Self::Vm => "vms",
            Self::Operation => "operations",
            Self::Event => "events",
            Self::Token => "tokens",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a kind of resource"))
    }
}

/// A resource: something with metadata that is stored, listed and watched.
pub trait Resource:
    Clone + fmt::Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    const KIND: Kind;
    /// Whether it lives in a project or belongs to the whole cloud.
    const IN_PROJECT: bool;

    fn metadata(&self) -> &Metadata;
    fn metadata_mut(&mut self) -> &mut Metadata;
    /// The phase as lists filter it; empty for what has none.
    fn phase(&self) -> &'static str;
    /// The node it is on, for lists and for the node's own watch.
    fn node(&self) -> Option<&str>;
}

/// Implements [`Resource`] for a struct with `metadata`, and optionally a `status` with phase and node.
macro_rules! resource {
    ($type:ident, $kind:ident, project: $in_project:literal, phase: |$p:ident| $phase:expr, node: |$n:ident| $node:expr) => {
        impl $crate::Resource for $type {
            const KIND: $crate::Kind = $crate::Kind::$kind;
            const IN_PROJECT: bool = $in_project;

            fn metadata(&self) -> &$crate::Metadata {
                &self.metadata
            }
            fn metadata_mut(&mut self) -> &mut $crate::Metadata {
                &mut self.metadata
            }
            fn phase(&self) -> &'static str {
                let $p = self;
                $phase
            }
            fn node(&self) -> Option<&str> {
                let $n = self;
                $node
            }
        }
    };
}
pub(crate) use resource;

/// A fieldless enum that is one lower-case word in JSON, on the command line and in lists.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident => $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $word)] $variant),+
        }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    other => Err(format!("{other:?} is none of {}", [$($word),+].join(", "))),
                }
            }
        }
    };
}
pub(crate) use words;
