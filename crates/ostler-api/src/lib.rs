//! ostler-api
