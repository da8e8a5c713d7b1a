// Package pkcs11 wraps under AES keys of a token that is reached through its vendor's PKCS#11
// library, with AES-GCM and the context as additional authenticated data. A key is named as in RFC
// 7512, token=LABEL;object=LABEL. Of several AES keys with that label the one with the greatest
// CKA_ID wraps: a customer rotates by making another. What it gives out says which:
//
//	{1} {length} CKA_ID  NONCE (12 bytes)  CIPHERTEXT, TAG
//
// The library runs in this process and must be trusted as this process is. Its calls cannot be
// stopped: one that hangs is left behind, and the next ones wait for it as long as they may.
// A program that was built without cgo has no PKCS#11.
package pkcs11

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// Config says which library and how to log in.
type Config struct {
	Module  string // the library's file
	PINFile string // with the user's PIN, read for each call
}

func (c Config) validate() error {
	if c.Module == "" || c.PINFile == "" {
		return errors.New("kms.pkcs11: want module, the library's file, and pin_file")
	}
	return nil
}

// parseKey gives the labels that a key's URI names.
func parseKey(cmk string) (token, object string, err error) {
	attributes := map[string]*string{"token": &token, "object": &object}
	for part := range strings.SplitSeq(cmk, ";") {
		name, value, ok := strings.Cut(part, "=")
		into := attributes[name]
		if !ok || into == nil || *into != "" {
			return "", "", badKey(cmk)
		}
		if *into, err = url.PathUnescape(value); err != nil {
			return "", "", badKey(cmk)
		}
	}
	if token == "" || object == "" {
		return "", "", badKey(cmk)
	}
	return token, object, nil
}

func badKey(cmk string) error {
	return fmt.Errorf("%.200q does not name a PKCS#11 key: want token=LABEL;object=LABEL, with other characters percent-encoded (RFC 7512)", cmk)
}

// CheckKey tells whether cmk names a key.
func CheckKey(cmk string) error {
	_, _, err := parseKey(cmk)
	return err
}
