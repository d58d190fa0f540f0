//! Learning on and forgetting: a fit on other images, from what a form keeps.

use crate::closed_form::{WeighedPatches, first_equal};
use crate::{ClosedForm, Embeddings, Error};

const PATCHES_COUNT: Error = Error::NeedsImages {
    reason: "patches count in this model, and they are chosen from the images",
};

impl ClosedForm {
    /// Whether [`ClosedForm::refit`] has what it needs.
    ///
    /// # Errors
    /// [`Error::NeedsImages`] where patches count, and for a form that was saved without its background.
    pub fn can_be_refitted(&self) -> Result<(), Error> {
        if self.patch_weight > 0.0 {
            return Err(PATCHES_COUNT);
        }
        if self.contrast.is_some() && self.background.is_none() {
            return Err(Error::NeedsImages {
                reason: "the model was saved by an earlier version, without its whole background",
            });
        }
        Ok(())
    }

    /// A fit on the kept images of `rows` and on `more`: what a fit on all of these from scratch gives, with the background, the
    /// known abnormal images and the object memory of this form. [`ClosedForm::kept`] of it numbers `rows`, then `more`. Of more
    /// images than are judged exactly only leaders of groups were kept: they stand for all.
    ///
    /// The object memory loses the places of every group that loses an image, and gains none.
    ///
    /// # Errors
    /// [`Error::NeedsImages`] where patches count, before or after, and for a form that was saved without its background;
    /// [`Error::AlsoAbnormal`] for one of `more` that is a known abnormal image; as [`ClosedForm::fit`].
    pub fn refit(&self, rows: &[usize], more: Option<&Embeddings>) -> Result<Self, Error> {
        self.can_be_refitted()?;
        if let Some(more) = more {
            self.normal.check_widths(more, "the normal embeddings")?;
            if let Some(known) = &self.known
                && let Some(image) = first_equal(more, &known.abnormal)?
            {
                return Err(Error::AlsoAbnormal { image });
            }
        }
        let kept = self.normal.select(rows);
        let all: Vec<Embeddings> = [kept].into_iter().chain(more.cloned()).collect();
        let all = Embeddings::joined(&all)?;
        let mut form = Self::fit(&all, self.background.as_ref(), &self.config)?;
        if form.patch_weight > 0.0 {
            return Err(PATCHES_COUNT);
        }
        if let Some(known) = &self.known {
            form.learn_abnormal(&known.abnormal)?;
        }
        let groups = self.groups_after(&form, rows);
        let number = |group: usize| groups.get(group).copied().flatten();
        form.patches = self.patches.as_ref().map(|patches| WeighedPatches {
            memory: patches.memory.with_groups(number),
            ..*patches
        });
        if let Some(memory) = self.objects() {
            let normal = memory.normal().with_groups(number);
            form.set_objects(memory.with_normal(normal));
        }
        Ok(form)
    }

    /// The group of each group in the `after` form; none for one that lost an image.
    fn groups_after(&self, after: &Self, rows: &[usize]) -> Vec<Option<usize>> {
        let mut whole = vec![true; self.groups.len()];
        let mut stays = vec![false; self.normal.len()];
        for &row in rows {
            if let Some(stays) = stays.get_mut(row) {
                *stays = true;
            }
        }
        for (group, stays) in self.groups.of.iter().zip(&stays) {
            if let (Some(whole), false) = (whole.get_mut(*group), stays) {
                *whole = false;
            }
        }
        // The group that a leader is in afterwards.
        let group_after = |group: usize| -> Option<usize> {
            let leader = *self.groups.leaders.get(group)?;
            let place = rows.iter().position(|row| *row == leader)?;
            let row = after.kept().iter().position(|kept| *kept == place)?;
            after.groups.of.get(row).copied()
        };
        whole
            .iter()
            .enumerate()
            .map(|(group, whole)| if *whole { group_after(group) } else { None })
            .collect()
    }
}
