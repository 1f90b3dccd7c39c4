//! What every back end must do, as tests.
