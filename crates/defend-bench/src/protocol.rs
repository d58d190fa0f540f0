//! From a data set and a protocol to experiments.

use defend_core::data::{ClassId, Dataset, Label, MultiObject, Protocol};
use serde::{Deserialize, Serialize};

use crate::Error;

/// What is normal; a class is named as the data set names it, or by its number.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ProtocolConfig {
    /// Uni-class: each class in turn is the normal one (Table 4). With several objects an image, an image is normal
    /// when it shows the normal class, whatever else it shows.
    OneVsAll {
        /// These classes only; all without it.
        #[serde(default)]
        classes: Vec<String>,
    },
    /// Multi-class: each class in turn is the abnormal one and an image of any other is normal (Table 2).
    AllVsOne {
        /// These classes only; all without it.
        #[serde(default)]
        classes: Vec<String>,
    },
    /// Multi-class with given normal sets (Table 5), an image is normal when it shows any of a set.
    NormalSets {
        /// The normal sets.
        sets: Vec<Vec<String>>,
    },
    /// As one-vs-all, of a data set with boxes: do maps show which object is the novel one?
    Objects {
        /// These classes only; all without it.
        #[serde(default)]
        classes: Vec<String>,
    },
    /// Industrial inspection: everything but the class "good" is abnormal, with masks where the data set has them.
    Defects,
}

/// One row of a table's inputs: what is normal.
pub(crate) struct Experiment {
    /// Name for tables and files.
    pub(crate) name: String,
    /// Names of the classes that are normal, or of the abnormal one.
    pub(crate) classes: Vec<String>,
    pub(crate) protocol: Box<dyn Protocol>,
}

impl ProtocolConfig {
    /// Whether maps are judged by the boxes around objects.
    pub(crate) fn judges_objects(&self) -> bool {
        matches!(self, Self::Objects { .. })
    }

    /// Whether it takes every class that there is, so that one without images is left out.
    pub(crate) fn takes_all(&self) -> bool {
        match self {
            Self::OneVsAll { classes } | Self::AllVsOne { classes } | Self::Objects { classes } => {
                classes.is_empty()
            }
            Self::NormalSets { .. } | Self::Defects => false,
        }
    }

    /// Name for tables and files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::OneVsAll { .. } => "one-vs-all",
            Self::AllVsOne { .. } => "all-vs-one",
            Self::NormalSets { .. } => "normal-sets",
            Self::Objects { .. } => "objects",
            Self::Defects => "defects",
        }
    }

    /// The experiments on a data set, in the order of its classes or of the configuration.
    ///
    /// # Errors
    /// [`Error::UnknownClass`].
    pub(crate) fn experiments(
        &self,
        data: &str,
        set: &dyn Dataset,
    ) -> Result<Vec<Experiment>, Error> {
        let class = |name: &String| {
            let by_number = || {
                let number: usize = name.parse().ok()?;
                (number < set.class_names().len()).then_some(ClassId(number as u32))
            };
            set.class(name)
                .or_else(by_number)
                .ok_or_else(|| Error::UnknownClass {
                    data: data.into(),
                    class: name.clone(),
                    known: set.class_names().to_vec(),
                })
        };
        let label = |id: ClassId| {
            let known = set.class_names().get(id.0 as usize);
            known.cloned().unwrap_or_else(|| id.0.to_string())
        };
        let each = |names: &[String], protocol: &dyn Fn(ClassId) -> Box<dyn Protocol>| {
            let names = if names.is_empty() {
                set.class_names()
            } else {
                names
            };
            let one = |name| {
                let id = class(name)?;
                Ok(Experiment {
                    name: label(id),
                    classes: vec![label(id)],
                    protocol: protocol(id),
                })
            };
            names.iter().map(one).collect()
        };
        match self {
            Self::OneVsAll { classes } | Self::Objects { classes } => {
                each(classes, &|id| Box::new(MultiObject { normal: vec![id] }))
            }
            // With several objects an image, one that shows any other class is normal (METHOD.md, section 4).
            Self::AllVsOne { classes } => each(classes, &|id| {
                let all = (0..set.class_names().len() as u32).map(ClassId);
                Box::new(MultiObject {
                    normal: all.filter(|other| *other != id).collect(),
                })
            }),
            Self::NormalSets { sets } => sets
                .iter()
                .map(|names| {
                    let normal = names.iter().map(class).collect::<Result<Vec<_>, _>>()?;
                    let classes: Vec<String> = normal.iter().map(|id| label(*id)).collect();
                    Ok(Experiment {
                        name: classes.join("+"),
                        classes,
                        protocol: Box::new(MultiObject { normal }),
                    })
                })
                .collect(),
            Self::Defects => each(&["good".into()], &|id| {
                Box::new(MultiObject { normal: vec![id] })
            }),
        }
    }
}

impl Experiment {
    /// Whether each of `indices` is abnormal.
    pub(crate) fn labels(&self, set: &dyn Dataset, indices: &[usize]) -> Vec<bool> {
        let label = |&i| self.protocol.label(set.classes(i)) == Label::Abnormal;
        indices.iter().map(label).collect()
    }
}
