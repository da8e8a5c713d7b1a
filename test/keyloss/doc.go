// Package keyloss tests what the users of an endpoint see when its project's key is taken away and
// given back: in psql, in a driver, in connections that are there and in those that come.
package keyloss
