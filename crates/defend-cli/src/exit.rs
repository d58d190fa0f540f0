//! How the program ends, for scripts.

use std::process::ExitCode;

/// What was found: 0 all normal, 1 something novel, 3 something unreadable; the highest that applies. Beside these, 2 is a wrong command line and
/// 4 a run that failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) novel: bool,
    pub(crate) unreadable: bool,
}

impl Exit {
    /// The code of a command line that has no meaning.
    pub(crate) const USAGE: u8 = 2;
    /// The code of a run that failed.
    pub(crate) const FAILED: u8 = 4;
    /// The code of a run whose reader has gone: what a shell says of a program that SIGPIPE ends.
    pub(crate) const CLOSED_PIPE: u8 = 141;

    /// After a job that finds nothing novel.
    pub(crate) fn after_skipping(unreadable: usize) -> Self {
        Self {
            novel: false,
            unreadable: unreadable > 0,
        }
    }

    pub(crate) fn code(self) -> u8 {
        match self {
            Self {
                unreadable: true, ..
            } => 3,
            Self { novel: true, .. } => 1,
            Self { .. } => 0,
        }
    }
}

/// A command line that has no meaning: it ends with code 2, as those that the parser refuses.
pub(crate) fn usage(message: String) -> anyhow::Error {
    use clap::CommandFactory;
    let mut command = crate::arguments::Arguments::command();
    command
        .error(clap::error::ErrorKind::ValueValidation, message)
        .into()
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_code_that_applies() {
        let code = |novel, unreadable| Exit { novel, unreadable }.code();
        assert_eq!(
            [
                code(false, false),
                code(true, false),
                code(false, true),
                code(true, true)
            ],
            [0, 1, 3, 3]
        );
    }
}
