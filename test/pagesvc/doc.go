// Package pagesvc tests the page server as a whole and without a compute: it imports a stock
// data directory, feeds the WAL that a stock server then writes, and compares every page, size
// and small file with what that server holds, now and at an LSN of the past.
package pagesvc
