//! The conformance suite on both back ends.

use std::sync::Arc;

use ostler_store::{MemoryStore, SqliteOptions, SqliteStore, Store, conformance_tests};
use tempfile::TempDir;

mod memory {
    use super::*;

    async fn fresh() -> (Arc<dyn Store>, ()) {
        (Arc::new(MemoryStore::new()), ())
    }

    conformance_tests!(fresh);
}

mod sqlite {
    use super::*;

    async fn fresh() -> (Arc<dyn Store>, TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(SqliteOptions::new(directory.path().join("state.db"))).unwrap();
        (store, directory)
    }

    conformance_tests!(fresh);
}
