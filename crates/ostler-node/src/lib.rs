//! ostler-node
