// Package pb is the contract between Holdfast's roles: the service calls and messages of
// holdfast.proto, and the Go code that protoc makes of it. What each call promises, and
// which errors it gives, stands in the .proto file.
package pb
