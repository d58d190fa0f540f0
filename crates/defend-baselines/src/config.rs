//! Any method, as a benchmark's configuration names it.

use serde::{Deserialize, Serialize};

use crate::{
    ConstantStudent, Kdad, Mahalanobis, MeanCls, Method, Msad, NearestNeighbours, OneClassHead,
    Ours, Padim, Panda, PatchCore, Token, Transformaly,
};

/// A method and its settings; in a configuration `kind = "patch-core"` and the settings that differ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum MethodConfig {
    /// This library's method.
    Defend(Box<Ours>),
    /// DN2.
    NearestNeighbours(NearestNeighbours),
    /// Cosine to the mean CLS token.
    MeanCls(MeanCls),
    /// Mahalanobis distance of the CLS token.
    Mahalanobis(Mahalanobis),
    /// The student that always predicts the mean.
    ConstantStudent(ConstantStudent),
    /// PaDiM.
    Padim(Padim),
    /// PatchCore.
    PatchCore(PatchCore),
    /// KDAD.
    Kdad(Kdad),
    /// Transformaly.
    Transformaly(Transformaly),
    /// PANDA with its adaptation.
    Panda(Panda),
    /// MSAD.
    Msad(Msad),
    /// Deep SVDD and FCDD's head.
    OneClassHead(OneClassHead),
}

impl MethodConfig {
    /// The method that it describes.
    pub fn method(&self) -> &dyn Method {
        match self {
            Self::Defend(method) => &**method,
            Self::NearestNeighbours(method) => method,
            Self::MeanCls(method) => method,
            Self::Mahalanobis(method) => method,
            Self::ConstantStudent(method) => method,
            Self::Padim(method) => method,
            Self::PatchCore(method) => method,
            Self::Kdad(method) => method,
            Self::Transformaly(method) => method,
            Self::Panda(method) => method,
            Self::Msad(method) => method,
            Self::OneClassHead(method) => method,
        }
    }

    /// The ones of ten lines on the teacher's untouched features, which every method has to beat (METHOD.md, section 3).
    pub fn references() -> [Self; 5] {
        let mean_patch = NearestNeighbours {
            token: Token::MeanPatch,
            ..NearestNeighbours::default()
        };
        [
            Self::NearestNeighbours(NearestNeighbours::default()),
            Self::NearestNeighbours(mean_patch),
            Self::MeanCls(MeanCls {}),
            Self::Mahalanobis(Mahalanobis {}),
            Self::ConstantStudent(ConstantStudent {}),
        ]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests may panic")]

    use super::*;

    #[test]
    fn settings_by_kind_and_no_unknown_ones() {
        let found: MethodConfig =
            serde_json::from_str(r#"{"kind": "patch-core", "share": 0.01}"#).unwrap();
        let MethodConfig::PatchCore(settings) = &found else {
            panic!("{found:?}");
        };
        assert_eq!(
            (settings.coreset_sampling_ratio, settings.candidates),
            (0.01, 20_000)
        );
        let wrong = r#"{"kind": "patch-core", "shares": 0.01}"#;
        assert!(serde_json::from_str::<MethodConfig>(wrong).is_err());
        assert!(serde_json::from_str::<MethodConfig>(r#"{"kind": "csi"}"#).is_err());
        let name = |settings: &str| {
            let ours: MethodConfig = serde_json::from_str(settings).unwrap();
            ours.method().name()
        };
        assert_eq!(name(r#"{"kind": "defend"}"#), "closed form");
        assert_eq!(name(r#"{"kind": "defend", "recipe": "paper"}"#), "paper");
        let ours = r#"{"kind": "defend", "settings": {"student": {"masked": {}}}}"#;
        assert_eq!(name(ours), "masked distillation");
        let ours: MethodConfig = serde_json::from_str(ours).unwrap();
        let again = serde_json::to_string(&ours).unwrap();
        assert_eq!(serde_json::from_str::<MethodConfig>(&again).unwrap(), ours);
    }
}
