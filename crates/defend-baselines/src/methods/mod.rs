//! One file a method.

pub(crate) mod kdad;
pub(crate) mod msad;
pub(crate) mod one_class_head;
pub(crate) mod ours;
pub(crate) mod padim;
pub(crate) mod panda;
pub(crate) mod patchcore;
pub(crate) mod simple;
pub(crate) mod transformaly;
