//! KNoC test world.

pub mod cases;
