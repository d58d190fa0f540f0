//! What a fit refuses before any work.

use crate::{BackgroundSource, DefendBuilder, DefendConfig, Error, Student};

/// The role that belongs to the dense stage.
const DENSE_OBJECTIVE: &str = "dense_objective";

impl DefendBuilder {
    /// Checked settings without a dense stage.
    pub(crate) fn untuned(&self, expected: &str) -> Result<DefendConfig, Error> {
        self.config.validate()?;
        if self.config.dense.is_some() {
            return Err(Error::Config {
                field: "dense",
                value: "set".into(),
                expected: format!("null: {expected}"),
            });
        }
        let of_parts = [
            ("region", self.config.region.is_some()),
            ("tiles", self.config.tiles.is_some()),
        ];
        if let Some((field, _)) = of_parts.into_iter().find(|(_, given)| *given) {
            return Err(Error::Config {
                field,
                value: "set".into(),
                expected: "null: backgrounds and tables of features are of whole images".into(),
            });
        }
        Ok(self.config.clone())
    }

    /// Refuses roles that the settings have no use for.
    pub(crate) fn check_roles(&self) -> Result<(), Error> {
        let masked = [
            ("feature_folder", self.features.is_some()),
            (
                "checkpoints",
                self.checkpoints.is_some() && self.config.dense.is_none(),
            ),
        ];
        let masked = self.roles.taken().into_iter().chain(masked);
        let masked: Vec<_> = masked
            .filter(|(role, _)| *role != DENSE_OBJECTIVE)
            .collect();
        let unused = |roles: &[(&'static str, bool)]| {
            roles
                .iter()
                .find(|(_, given)| *given)
                .map(|(role, _)| *role)
        };
        let (field, expected) = match &self.config.student {
            Student::ClosedForm(_) => (unused(&masked), "a masked student, which it belongs to"),
            Student::Masked(_) => {
                let given = matches!(
                    self.background,
                    BackgroundSource::Ready(_) | BackgroundSource::Photos(..)
                );
                let closed = [
                    ("background", given),
                    ("abnormal", self.abnormal.is_some()),
                    ("drop_suspects", self.drop_suspects > 0),
                ];
                (unused(&closed), "the closed form, which works with it")
            }
        };
        let (field, expected) = match field {
            None if self.roles.dense_objective.is_some() && self.config.dense.is_none() => {
                (Some(DENSE_OBJECTIVE), "settings with a dense stage")
            }
            _ => (field, expected),
        };
        match field {
            None => Ok(()),
            Some(field) => Err(Error::Config {
                field,
                value: "set".into(),
                expected: expected.into(),
            }),
        }
    }
}
