//! Which container a client calls.

/// The other end of a call.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod.
    pub pod: &'a str,
    /// Its container.
    pub container: &'a str,
}
