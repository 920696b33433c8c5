//! KNoC test world.
