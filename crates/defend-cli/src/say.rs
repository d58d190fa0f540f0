//! What the program says beside its results, on standard error.

use std::sync::atomic::{AtomicBool, Ordering};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Says nothing from now on but faults.
pub(crate) fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// Says more from now on.
pub(crate) fn be_verbose() {
    VERBOSE.store(true, Ordering::Relaxed);
}

pub(crate) fn is_verbose() -> bool {
    VERBOSE.load(Ordering::Relaxed)
}

pub(crate) fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// A line on standard error, unless the program is to be quiet; a reader that has gone away is no fault.
macro_rules! say {
    ($($what:tt)*) => {
        if !$crate::say::is_quiet() {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), $($what)*);
        }
    };
}

/// A line on standard error on what has failed, also from a program that is quiet.
macro_rules! complain {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($what)*);
    }};
}

/// A line on standard output; an error when it cannot be written.
macro_rules! tell {
    ($($what:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($what)*)
    }};
}

pub(crate) use {complain, say, tell};
