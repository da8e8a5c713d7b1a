package kmsim

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"math/big"
	"net/http"
	"strings"
	"time"
)

// Tenant is the directory that Azure's clients log in to.
const Tenant = "11111111-2222-3333-4444-555555555555"

// answerLogin speaks as much of Microsoft's login as an application with a secret needs.
func (s *Sim) answerLogin(r *request) answer {
	base := "https://" + r.Host + "/" + Tenant
	if strings.HasSuffix(r.URL.Path, "/openid-configuration") {
		return answer{header: jsonType, body: map[string]string{"issuer": base + "/v2.0", "authorization_endpoint": base + "/oauth2/v2.0/authorize", "token_endpoint": base + "/oauth2/v2.0/token"}}
	}
	name := r.formValue("client_id")
	r.entry = Entry{Protocol: Azure, Op: "token", Principal: name}
	if r.fault == BadIdentity {
		return answer{status: http.StatusUnauthorized, code: "invalid_client", header: jsonType, body: map[string]string{"error": "invalid_client", "error_description": "AADSTS7000215: Invalid client secret provided."}}
	}
	return answer{header: jsonType, body: map[string]any{"token_type": "Bearer", "expires_in": int(time.Hour / time.Second), "access_token": s.giveCredential("", name)}}
}

var jsonType = map[string]string{"Content-Type": "application/json"}

func azureError(status int, code, inner, message string) answer {
	e := map[string]any{"code": code, "message": message}
	outcome := code
	if inner != "" {
		e["innererror"] = map[string]string{"code": inner}
		outcome = inner
	}
	return answer{status: status, code: outcome, body: map[string]any{"error": e}}
}

func azureRefuse(why refusal) answer {
	switch why {
	case forbidden:
		return azureError(http.StatusForbidden, "Forbidden", "ForbiddenByRbac", "Caller is not authorized to perform action on resource.")
	case disabled:
		return azureError(http.StatusForbidden, "Forbidden", "KeyDisabled", "Operation is not allowed on a disabled key.")
	}
	return azureError(http.StatusNotFound, "KeyNotFound", "", "A key with this name was not found in this key vault. If you recently deleted this key you may be able to recover it.")
}

// answerAzure speaks Key Vault's keys. Its clients ask once without a token to learn where
// they have to log in.
func (s *Sim) answerAzure(r *request) answer {
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/") // keys NAME [VERSION [OPERATION]]
	for len(parts) < 4 {
		parts = append(parts, "")
	}
	op := parts[3]
	if r.Method == http.MethodGet {
		op = "get"
	}
	r.entry = Entry{Protocol: Azure, Op: op, Key: parts[0] + "/" + parts[1], Principal: s.nameOf(token)}
	header := map[string]string{"Content-Type": "application/json; charset=utf-8", "X-Ms-Request-Id": r.id}
	var a answer
	switch {
	case token == "":
		r.entry.Op = "challenge"
		header["WWW-Authenticate"] = `Bearer authorization="https://` + r.Host + "/" + Tenant + `", resource="https://vault.azure.net"`
		a = azureError(http.StatusUnauthorized, "Unauthorized", "", "AKV10000: Request is missing a Bearer or PoP token.")
	case r.fault == BadCredential:
		header["WWW-Authenticate"] = `Bearer authorization="https://` + r.Host + "/" + Tenant + `", resource="https://vault.azure.net", error="invalid_token"`
		a = azureError(http.StatusUnauthorized, "Unauthorized", "", "AKV10087: the token has expired.")
	case r.fault == Throttle:
		a = azureError(http.StatusTooManyRequests, "Throttled", "", "Request was not processed because too many requests were received.")
	case r.fault == Internal:
		a = azureError(http.StatusInternalServerError, "InternalServerError", "", "An internal error occurred.")
	default:
		a = s.doAzure(r, op, parts[2])
	}
	a.header = header
	return a
}

func (s *Sim) doAzure(r *request, op, id string) answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, why := s.look(r.entry.Key)
	if op != "get" {
		k, why = s.useLocked(r.entry.Key)
	}
	if why == usable && (k.state == PendingDeletion || k.state == Destroyed) {
		why = absent
	}
	if why != usable {
		return azureRefuse(why)
	}
	v := k.current()
	if id != "" {
		v = k.named(id)
	}
	if v == nil {
		return azureRefuse(absent)
	}
	kid := "https://" + r.Host + "/" + k.ref + "/" + v.id
	if op == "get" {
		e := big.NewInt(int64(v.rsa.E)).Bytes()
		return answer{body: map[string]any{"attributes": map[string]bool{"enabled": k.state == Enabled},
			"key": map[string]any{"kid": kid, "kty": "RSA", "n": rawURL(v.rsa.N.Bytes()), "e": rawURL(e)}}}
	}
	if v.destroyed {
		return azureRefuse(disabled)
	}
	return azureOperate(r, op, kid, v)
}

func rawURL(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func azureOperate(r *request, op, kid string, v *version) answer {
	var in struct{ Alg, Value string }
	err := decode(r.body, &in)
	var value, out []byte
	if err == nil {
		value, err = base64.RawURLEncoding.DecodeString(in.Value)
	}
	if err == nil {
		switch op + " " + in.Alg {
		case "wrapkey RSA-OAEP-256":
			out, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, &v.rsa.PublicKey, value, nil)
		case "unwrapkey RSA-OAEP-256":
			out, err = rsa.DecryptOAEP(sha256.New(), nil, v.rsa, value, nil)
		case "sign PS256":
			out, err = rsa.SignPSS(rand.Reader, v.rsa, crypto.SHA256, value, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		default:
			return azureError(http.StatusBadRequest, "BadParameter", "", "kmsim has no operation "+op+" with algorithm "+in.Alg)
		}
	}
	if err != nil {
		return azureError(http.StatusBadRequest, "BadParameter", "", "The parameter is incorrect.")
	}
	return answer{body: map[string]string{"kid": kid, "value": rawURL(out)}}
}
