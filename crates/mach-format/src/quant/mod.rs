//! Quantised block formats, one file each.

pub mod affine;
