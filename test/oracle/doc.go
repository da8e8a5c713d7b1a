// Package oracle proves redo against PostgreSQL itself (invariant P1). Its test runs a
// stock server under wal_consistency_checking through a workload that makes every kind of
// record that pageserver/redo knows, replays all of that WAL on a copy of the directory
// taken before, and compares three times: each changed page with the image in its record,
// the final state with the server's own files, and with those of a stock server that
// recovered from the same WAL.
//
// Short lives of servers of their own do the same where numbers wrap around (xids at 2^31 and
// 2^32, multixacts and their members), where one transaction drops thousands of tables, for page
// images compressed by each method, and for kinds of records that the workload cannot make.
//
// The replay here is small and shares nothing with pageserver/ingest: a second opinion on
// which pages, sizes and files a record concerns. Ingest follows the same WAL beside it, and
// must come to the same sizes, files and counters.
package oracle
