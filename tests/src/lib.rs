//! KNoC test world.

pub mod cases;
pub mod fake_api;
