//! A staging file that survives restarts.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::StorageError;

/// Where a download came from: its URL and the validator (strong `ETag` or `Last-Modified`) of the bytes so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadSource {
    pub url: String,
    pub validator: String,
}

/// An upload in progress; only one holder at a time.
#[derive(Debug)]
pub struct Upload {}

impl Upload {
    /// Bytes staged so far: where the sender goes on.
    pub fn offset(&self) -> u64 {
        unimplemented!()
    }

    /// Appends bytes.
    pub async fn write(&mut self, _bytes: Bytes) -> Result<(), StorageError> {
        unimplemented!()
    }

    /// Makes what was written so far survive a crash of the machine.
    pub async fn sync(&mut self) -> Result<(), StorageError> {
        unimplemented!()
    }

    /// Drops everything and begins again at 0.
    pub async fn restart(&mut self) -> Result<(), StorageError> {
        unimplemented!()
    }
}
