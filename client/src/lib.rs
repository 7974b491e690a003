//! A silo's side of Concord: reads the silo's data, trains at home, and lets nothing out but the global adapter.

pub mod bench;
pub mod commands;
pub mod config;
pub mod coordinator;
pub mod daemon;
pub mod data;
pub mod egress;
pub mod export;
pub mod patience;
pub mod profile;
pub mod receipts;
pub mod session;
pub mod simulate;
pub mod status;
pub mod transfer;
pub mod vault;

#[cfg(test)]
mod testing;
