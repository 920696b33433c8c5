//! Every client there is, each doing all that the kubelet's streams are for, on real parts; and the table of it.
//!
//! [`clients`] lists the clients, [`check`] says what each verb must show, [`table`] writes docs/interop.md where
//! `KNOC_INTEROP_PAGE` names it (`make interop`). What a client's library cannot do is not tried: its entry says why,
//! and the table repeats it.

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

/// Has the client do all it can, writes its row and answers what went wrong.
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
            // A check that panics would take the row of the others with it.
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
