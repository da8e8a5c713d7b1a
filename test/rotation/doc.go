// Package rotation changes a project's keys under a running workload, in every way that a customer can:
// a new version of the CMK, another CMK, another provider and back, new versions of the KEK, with parts killed
// in the middle; and measures what a rotation costs.
package rotation
