//! ostler-storage
