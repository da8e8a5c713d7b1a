package kmsim

import (
	"encoding/binary"
	"encoding/json"
	"net/http"
	"strings"
)

// Where AWS keys are.
const (
	Region  = "eu-central-1"
	Account = "111122223333"
)

// awsInput is every parameter that the operations below take.
type awsInput struct {
	KeyId             string
	Plaintext         []byte
	CiphertextBlob    []byte
	EncryptionContext map[string]string
}

// awsErrors says what AWS KMS's API reference gives for a key that cannot be used.
var awsErrors = map[refusal]struct{ code, message string }{
	absent:          {"NotFoundException", "Key does not exist"},
	destroyed:       {"NotFoundException", "Key does not exist"},
	forbidden:       {"AccessDeniedException", "User is not authorized to perform this operation on the resource"},
	disabled:        {"DisabledException", "Key is disabled."},
	pendingDeletion: {"KMSInvalidStateException", "Key is pending deletion."},
}

var awsFaults = map[Fault]answer{
	Throttle:      awsError(http.StatusBadRequest, "ThrottlingException", "You have exceeded the rate at which you may call KMS."),
	Internal:      awsError(http.StatusInternalServerError, "KMSInternalException", "An internal error occurred."),
	BadCredential: awsError(http.StatusBadRequest, "ExpiredTokenException", "The security token included in the request is expired"),
}

func awsError(status int, code, message string) answer {
	return answer{status: status, code: code, body: map[string]string{"__type": code, "message": message}}
}

func awsRefuse(why refusal) answer {
	e := awsErrors[why]
	return awsError(http.StatusBadRequest, e.code, e.message)
}

// answerAWS speaks AWS KMS's JSON 1.1.
func (s *Sim) answerAWS(r *request) answer {
	op := strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
	r.entry = Entry{Protocol: AWS, Op: op, Principal: s.nameOf(accessKey(r.Header.Get("Authorization")))}
	a := s.doAWS(r, op)
	a.header = map[string]string{"Content-Type": "application/x-amz-json-1.1", "X-Amzn-Requestid": r.id}
	return a
}

// accessKey is who signed a request, by AWS's signature version 4.
func accessKey(authorization string) string {
	_, credential, _ := strings.Cut(authorization, "Credential=")
	id, _, _ := strings.Cut(credential, "/")
	return id
}

func (s *Sim) doAWS(r *request, op string) answer {
	if r.entry.Principal == "" {
		return awsError(http.StatusBadRequest, "MissingAuthenticationTokenException", "Missing Authentication Token")
	}
	var in awsInput
	if err := decode(r.body, &in); err != nil {
		return awsError(http.StatusBadRequest, "SerializationException", err.Error())
	}
	r.entry.Key = in.KeyId
	if a, ok := awsFaults[r.fault]; ok {
		return a
	}
	do := map[string]func(*Sim, awsInput) answer{
		"Encrypt": (*Sim).awsEncrypt, "Decrypt": (*Sim).awsDecrypt, "DescribeKey": (*Sim).awsDescribe,
		"CreateKey":  (*Sim).awsCreate,
		"DisableKey": awsSetState(Disabled), "EnableKey": awsSetState(Enabled),
		"ScheduleKeyDeletion": awsSetState(PendingDeletion), "CancelKeyDeletion": awsSetState(Disabled),
		"RotateKeyOnDemand": (*Sim).awsRotate,
	}[op]
	if do == nil {
		return awsError(http.StatusBadRequest, "UnsupportedOperationException", "kmsim has no operation "+op)
	}
	return do(s, in)
}

// awsAAD binds a context in one form, whatever the order of its pairs.
func awsAAD(ref string, context map[string]string) []byte {
	b, err := json.Marshal(context)
	if err != nil {
		panic("a map of strings is JSON")
	}
	return append([]byte(ref+"\n"), b...)
}

// awsBlob is {length of the ARN} ARN {version, 4 bytes} sealed.
func awsBlob(ref string, v *version, sealed []byte) []byte {
	b := append([]byte{byte(len(ref))}, ref...)
	return append(binary.BigEndian.AppendUint32(b, uint32(v.n)), sealed...)
}

func parseAWSBlob(b []byte) (ref string, n int, sealed []byte, ok bool) {
	if len(b) < 1 || len(b) < 1+int(b[0])+4 {
		return "", 0, nil, false
	}
	ref, b = string(b[1:1+b[0]]), b[1+b[0]:]
	return ref, int(binary.BigEndian.Uint32(b)), b[4:], true
}

func (s *Sim) awsEncrypt(in awsInput) answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, why := s.useLocked(in.KeyId)
	if why != usable {
		return awsRefuse(why)
	}
	if len(in.Plaintext) < 1 || len(in.Plaintext) > 4096 {
		return awsError(http.StatusBadRequest, "ValidationException", "Plaintext: want 1 to 4096 bytes")
	}
	v := k.current()
	blob := awsBlob(k.ref, v, v.seal(in.Plaintext, awsAAD(k.ref, in.EncryptionContext)))
	return answer{body: map[string]any{"CiphertextBlob": blob, "KeyId": k.ref, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}}
}

func (s *Sim) awsDecrypt(in awsInput) answer {
	if len(in.CiphertextBlob) == 0 {
		return awsError(http.StatusBadRequest, "ValidationException", "CiphertextBlob: want at least 1 byte")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	k, why := s.useLocked(in.KeyId)
	if why != usable {
		return awsRefuse(why)
	}
	ref, n, sealed, ok := parseAWSBlob(in.CiphertextBlob)
	if ok && ref != k.ref && s.mu.keys[ref] != nil {
		return awsError(http.StatusBadRequest, "IncorrectKeyException", "The key ID in the request does not identify a key that can perform this operation.")
	}
	v := k.find(n)
	if !ok || v == nil || v.destroyed {
		return awsError(http.StatusBadRequest, "InvalidCiphertextException", "")
	}
	plain, err := v.open(sealed, awsAAD(k.ref, in.EncryptionContext))
	if err != nil {
		return awsError(http.StatusBadRequest, "InvalidCiphertextException", "")
	}
	return answer{body: map[string]any{"Plaintext": plain, "KeyId": k.ref, "KeyMaterialId": v.id + v.id, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}}
}

func awsMetadata(k *key) map[string]any {
	state := map[State]string{Enabled: "Enabled", Disabled: "Disabled", PendingDeletion: "PendingDeletion"}[k.state]
	_, id, _ := strings.Cut(k.ref, ":key/")
	current := k.current().id
	return map[string]any{"Arn": k.ref, "KeyId": id, "AWSAccountId": Account, "Enabled": k.state == Enabled, "KeyState": state,
		"KeyUsage": "ENCRYPT_DECRYPT", "KeySpec": "SYMMETRIC_DEFAULT", "CurrentKeyMaterialId": current + current}
}

func (s *Sim) awsDescribe(in awsInput) answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, why := s.look(in.KeyId)
	if why == usable && k.state == Destroyed {
		why = destroyed
	}
	if why != usable {
		return awsRefuse(why)
	}
	return answer{body: map[string]any{"KeyMetadata": awsMetadata(k)}}
}

func (s *Sim) awsCreate(awsInput) answer {
	ref, err := s.CreateKey(AWS, newID())
	if err != nil {
		return awsError(http.StatusInternalServerError, "KMSInternalException", err.Error())
	}
	return s.awsDescribe(awsInput{KeyId: ref})
}

// awsSetState is for who owns the key: Revoke does not keep them from it.
func awsSetState(state State) func(*Sim, awsInput) answer {
	return func(s *Sim, in awsInput) answer {
		s.mu.Lock()
		defer s.mu.Unlock()
		k := s.mu.keys[in.KeyId]
		switch {
		case k == nil || k.state == Destroyed:
			return awsRefuse(absent)
		case state == Enabled && k.state == PendingDeletion:
			return awsRefuse(pendingDeletion)
		}
		if err := k.set(state); err != nil {
			return awsError(http.StatusBadRequest, "KMSInvalidStateException", err.Error())
		}
		return answer{body: map[string]string{"KeyId": k.ref}}
	}
}

func (s *Sim) awsRotate(in awsInput) answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, why := s.useLocked(in.KeyId)
	if why != usable {
		return awsRefuse(why)
	}
	if err := k.rotate(); err != nil {
		return awsError(http.StatusInternalServerError, "KMSInternalException", err.Error())
	}
	return answer{body: map[string]string{"KeyId": k.ref}}
}
