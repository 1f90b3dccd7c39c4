//! ostler-control
