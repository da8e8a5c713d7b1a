package kmsim

import (
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
)

// answerTransit speaks the transit engine of Vault and OpenBao, and the one call by which a
// token looks at itself. An error has no request id there: only a caller's own correlation
// id can be found in the audit log.
func (s *Sim) answerTransit(r *request) answer {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	token := r.Header.Get("X-Vault-Token")
	r.entry = Entry{Protocol: Transit, Op: r.Method + " " + path, Principal: token, CallersID: r.Header.Get("X-Correlation-Id")}
	a := s.doTransit(r, path, token)
	a.header = map[string]string{"Content-Type": "application/json"}
	return a
}

func transitError(status int, message string) answer {
	errors := []string{}
	if message != "" {
		errors = append(errors, message)
	}
	return answer{status: status, code: strconv.Itoa(status), body: map[string]any{"errors": errors}}
}

func (r *request) transitData(data map[string]any) answer {
	return answer{body: map[string]any{"request_id": r.id, "data": data}}
}

func (s *Sim) doTransit(r *request, path, token string) answer {
	switch {
	case r.fault == Throttle:
		return transitError(http.StatusTooManyRequests, "request path: rate limit quota exceeded")
	case r.fault == Internal:
		return transitError(http.StatusServiceUnavailable, "Vault is sealed")
	case r.fault == BadCredential || token == "":
		return transitError(http.StatusForbidden, "permission denied")
	case path == "auth/token/lookup-self":
		return r.transitData(map[string]any{"ttl": 3600})
	}
	// MOUNT/OPERATION/NAME
	parts := strings.Split(path, "/")
	if len(parts) < 3 {
		return transitError(http.StatusNotFound, "no handler for route")
	}
	op, name := parts[len(parts)-2], parts[len(parts)-1]
	ref := strings.Join(parts[:len(parts)-2], "/") + "/keys/" + name
	r.entry.Key = ref
	var in struct {
		Plaintext      []byte `json:"plaintext"`
		Ciphertext     string `json:"ciphertext"`
		AssociatedData []byte `json:"associated_data"`
	}
	if op != "keys" {
		if err := decode(r.body, &in); err != nil {
			return transitError(http.StatusBadRequest, "failed to parse JSON input")
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k, why := s.look(ref)
	if op != "keys" {
		k, why = s.useLocked(ref)
	}
	if k != nil && k.state == Destroyed {
		why = absent
	}
	switch {
	case why == absent && op == "keys":
		return transitError(http.StatusNotFound, "")
	case why == absent:
		return transitError(http.StatusBadRequest, "encryption key not found")
	case why != usable: // transit knows no disabled keys: policies are withdrawn
		return transitError(http.StatusForbidden, "1 error occurred:\n\t* permission denied\n\n")
	}
	switch op {
	case "keys":
		return r.transitData(map[string]any{"name": name, "type": "aes256-gcm96", "latest_version": len(k.versions), "min_decryption_version": k.oldest()})
	case "encrypt":
		v := k.current()
		sealed := base64.StdEncoding.EncodeToString(v.seal(in.Plaintext, in.AssociatedData))
		return r.transitData(map[string]any{"ciphertext": "vault:v" + strconv.Itoa(v.n) + ":" + sealed, "key_version": v.n})
	case "decrypt":
		return r.transitDecrypt(k, in.Ciphertext, in.AssociatedData)
	}
	return transitError(http.StatusNotFound, "unsupported path")
}

// oldest is the first version that still decrypts.
func (k *key) oldest() int {
	for _, v := range k.versions {
		if !v.destroyed {
			return v.n
		}
	}
	return len(k.versions)
}

func (r *request) transitDecrypt(k *key, ciphertext string, aad []byte) answer {
	version, encoded, ok := strings.Cut(strings.TrimPrefix(ciphertext, "vault:v"), ":")
	n, err := strconv.Atoi(version)
	v := k.find(n)
	switch {
	case !ok || err != nil || v == nil:
		return transitError(http.StatusBadRequest, "invalid ciphertext")
	case v.destroyed:
		return transitError(http.StatusBadRequest, "ciphertext or signature version is disallowed by policy (too old)")
	}
	sealed, err := base64.StdEncoding.DecodeString(encoded)
	if err == nil {
		var plain []byte
		if plain, err = v.open(sealed, aad); err == nil {
			return r.transitData(map[string]any{"plaintext": plain})
		}
	}
	return transitError(http.StatusBadRequest, "cipher: message authentication failed")
}
