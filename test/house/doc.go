// Package house holds the rules of the house as tests: who may import whom, where each
// dependency may appear, that packages say their idea and that files stay readable.
package house
