//! What executes a guest's instructions.

use crate::resource::words;

words! {
    /// What a VM asks for.
    AcceleratorWish {
        /// KVM where it really runs ordinary guests, else TCG with a warning in the node's status.
        Auto => "auto",
        Kvm => "kvm",
        Tcg => "tcg",
    }
}

words! {
    /// What a node offers and what a VM runs on.
    Accelerator {
        /// The processor's own virtualization.
        Kvm => "kvm",
        /// QEMU's translator: runs everywhere, several times slower.
        Tcg => "tcg",
    }
}

impl AcceleratorWish {
    /// Which of the offered ones this wish takes; none when it cannot be had.
    pub fn pick(self, offered: &[Accelerator]) -> Option<Accelerator> {
        let has = |wanted: Accelerator| offered.contains(&wanted).then_some(wanted);
        match self {
            Self::Auto => has(Accelerator::Kvm).or_else(|| has(Accelerator::Tcg)),
            Self::Kvm => has(Accelerator::Kvm),
            Self::Tcg => has(Accelerator::Tcg),
        }
    }
}
