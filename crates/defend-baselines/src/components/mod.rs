//! What methods share: densities, neighbours, training.

pub(crate) mod adapted;
pub(crate) mod gaussian;
pub(crate) mod middle;
pub(crate) mod neighbours;
pub(crate) mod scored;
