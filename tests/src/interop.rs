//! Tests all stream verbs of the kubelet with every client on the real stack, and writes the table of the results.
//!
//! [`clients`] lists the clients, [`check`] defines what each verb must show, [`table`] writes docs/interop.md if
//! `KNOC_INTEROP_PAGE` is set to it (`make interop`). A verb that a client's library does not support is not tested: its entry gives the
//! reason, and the table repeats it.

pub mod check;
pub mod clients;
mod kubectl;
pub mod table;
pub mod target;

use anyhow::bail;
use futures::FutureExt as _;

use self::{
    check::Scene,
    clients::{Client, Verb},
    table::Cell,
};
use crate::World;

/// Tests all verbs that the client supports, writes its row and returns the errors.
pub async fn run(name: &str) -> anyhow::Result<()> {
    let client = Client::named(name)?;
    let world = World::new("interop").await?;
    let server = world.server_version().await?;
    let scene = Scene::set(world, client).await?;
    let mut row = Vec::new();
    let mut wrong = Vec::new();
    for verb in Verb::ALL {
        let cell = if let Some(reason) = scene.client.lacks(verb) {
            Cell::Lacking(reason)
        } else {
            // A check that panics must not prevent the results of the others.
            let outcome = std::panic::AssertUnwindSafe(scene.check(verb)).catch_unwind();
            match outcome.await {
                Ok(Ok(())) => Cell::Works,
                Ok(Err(error)) => {
                    wrong.push(format!("{}: {error:#}", verb.title()));
                    Cell::Fails
                }
                Err(_) => bail!("{} of {name} panicked", verb.title()),
            }
        };
        row.push(cell);
    }
    table::write(&server, &scene.client, &row)?;
    if !wrong.is_empty() {
        let count = wrong.len();
        bail!("{name}: {count} wrong\n{}", wrong.join("\n"));
    }
    scene.world.finish().await
}
