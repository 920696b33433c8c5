//! The pod's own address: containers wait for it, and the report names it.

use std::net::Ipv4Addr;

use super::{super::report::Missing, Supervisor};

impl Supervisor {
    /// The pod has its address, or its containers start without one. An address may still come afterwards.
    pub(super) fn addressed(&mut self, address: Option<Ipv4Addr>) {
        self.waits_for_address = false;
        let Some(address) = address else { return };
        self.publisher.update(|report| {
            let network = report.network.get_or_insert_default();
            network.address = address.to_string();
        });
    }

    /// Why containers do not start.
    pub(super) fn missing(&self) -> Missing<'_> {
        if self.has_values() {
            Missing::Address
        } else {
            Missing::Values(&self.values_missing)
        }
    }
}
