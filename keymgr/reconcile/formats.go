package reconcile

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Formats are the logs that Read knows.
var Formats = []string{"cloudtrail", "gcp", "azure", "vault", "kmsim"}

// maxLog bounds an exported log, unpacked, in bytes.
const maxLog = 4 << 30

// Read reads an exported log, as JSON documents one after the other, lines of JSON among them, perhaps
// packed by gzip. Entries of other services and operations without a key are left out;
// members that are not known are ignored.
func Read(format string, r io.Reader) ([]Call, error) {
	parse := map[string]func(json.RawMessage) ([]Call, error){
		"cloudtrail": parseCloudTrail, "gcp": parseGoogle, "azure": parseAzure, "vault": parseVault, "kmsim": parseKMSim,
	}[format]
	if parse == nil {
		return nil, fmt.Errorf("log format %q is not known: want one of %s", format, strings.Join(Formats, ", "))
	}
	r, err := unpacked(r)
	if err != nil {
		return nil, err
	}
	var calls []Call
	dec := json.NewDecoder(io.LimitReader(r, maxLog))
	for n := 1; ; n++ {
		var doc json.RawMessage
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		var more []Call
		if err == nil {
			more, err = parse(doc)
		}
		if err != nil {
			return nil, fmt.Errorf("JSON document %d, before byte %d: %w", n, dec.InputOffset(), err)
		}
		calls = append(calls, more...)
	}
	if format == "vault" {
		calls = answeredOnly(calls)
	}
	return calls, nil
}

func unpacked(r io.Reader) (io.Reader, error) {
	head := make([]byte, 2)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	whole := io.MultiReader(bytes.NewReader(head[:n]), r)
	if n == 2 && head[0] == 0x1f && head[1] == 0x8b {
		return gzip.NewReader(whole)
	}
	return whole, nil
}

// list reads an array, or one entry.
func list[E any](doc json.RawMessage) ([]E, error) {
	var all []E
	if trimmed := bytes.TrimSpace(doc); len(trimmed) > 0 && trimmed[0] == '[' {
		return all, json.Unmarshal(doc, &all)
	}
	var one E
	err := json.Unmarshal(doc, &one)
	return append(all, one), err
}

// trailEvent is an event record of CloudTrail (user guide, "CloudTrail record contents"; KMS's developer
// guide, "Examples of AWS KMS log entries").
type trailEvent struct {
	EventTime    time.Time `json:"eventTime"`
	EventSource  string    `json:"eventSource"`
	EventName    string    `json:"eventName"`
	ErrorCode    string    `json:"errorCode"`
	RequestID    string    `json:"requestID"`
	UserIdentity struct {
		ARN       string `json:"arn"`
		InvokedBy string `json:"invokedBy"`
	} `json:"userIdentity"`
	RequestParameters struct {
		KeyID string `json:"keyId"`
	} `json:"requestParameters"`
	Resources []struct {
		ARN string `json:"ARN"`
	} `json:"resources"`
}

// parseCloudTrail reads a log file ("Records"), what `aws cloudtrail lookup-events` prints
// ("Events", each with its record as text), or records by themselves.
func parseCloudTrail(doc json.RawMessage) ([]Call, error) {
	type looked struct {
		CloudTrailEvent string `json:"CloudTrailEvent"`
	}
	type file struct {
		Records []trailEvent `json:"Records"`
		Events  []looked     `json:"Events"`
		trailEvent
	}
	docs, err := list[file](doc)
	if err != nil {
		return nil, err
	}
	var calls []Call
	for _, d := range docs {
		events := append(d.Records, d.trailEvent)
		for _, l := range d.Events {
			var e trailEvent
			if err := json.Unmarshal([]byte(l.CloudTrailEvent), &e); err != nil {
				return nil, fmt.Errorf("CloudTrailEvent: %w", err)
			}
			events = append(events, e)
		}
		for _, e := range events {
			if c, ok := e.call(); ok {
				calls = append(calls, c)
			}
		}
	}
	return calls, nil
}

func (e *trailEvent) call() (Call, bool) {
	c := Call{Time: e.EventTime, Key: e.RequestParameters.KeyID, Op: e.EventName, Principal: e.UserIdentity.ARN, Failure: e.ErrorCode}
	for _, r := range e.Resources {
		if strings.Contains(r.ARN, ":key/") {
			c.Key = r.ARN
		}
	}
	if c.Principal == "" {
		c.Principal = e.UserIdentity.InvokedBy
	}
	if e.RequestID != "" {
		c.IDs = []string{e.RequestID}
	}
	return c, e.EventSource == "kms.amazonaws.com" && c.Key != ""
}

// googleEntry is a LogEntry whose payload is a google.cloud.audit.AuditLog ("Understanding audit
// logs"); the caller's reason is AttributeContext.Request's.
type googleEntry struct {
	Timestamp    time.Time `json:"timestamp"`
	InsertID     string    `json:"insertId"`
	ProtoPayload struct {
		ServiceName  string `json:"serviceName"`
		MethodName   string `json:"methodName"`
		ResourceName string `json:"resourceName"`
		Status       struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"status"`
		AuthenticationInfo struct {
			PrincipalEmail string `json:"principalEmail"`
		} `json:"authenticationInfo"`
		RequestMetadata struct {
			RequestAttributes struct {
				Reason string `json:"reason"`
			} `json:"requestAttributes"`
		} `json:"requestMetadata"`
	} `json:"protoPayload"`
}

// parseGoogle reads what `gcloud logging read --format=json` prints, or lines of a sink.
func parseGoogle(doc json.RawMessage) ([]Call, error) {
	entries, err := list[googleEntry](doc)
	if err != nil {
		return nil, err
	}
	var calls []Call
	for _, e := range entries {
		p := e.ProtoPayload
		if p.ServiceName != "cloudkms.googleapis.com" || p.ResourceName == "" {
			continue
		}
		c := Call{Time: e.Timestamp, Key: strings.TrimPrefix(p.ResourceName, "//cloudkms.googleapis.com/"), Op: p.MethodName[strings.LastIndex(p.MethodName, ".")+1:],
			Principal: p.AuthenticationInfo.PrincipalEmail}
		if p.Status.Code != 0 {
			c.Failure = fmt.Sprintf("status %d", p.Status.Code)
		}
		for _, id := range []string{p.RequestMetadata.RequestAttributes.Reason, e.InsertID} {
			if id != "" {
				c.IDs = append(c.IDs, id)
			}
		}
		calls = append(calls, c)
	}
	return calls, nil
}

// azureRecord is an AuditEvent ("Azure Key Vault logging"). Which of its ids is the one that an answer has
// in x-ms-request-id is not documented; any of them that matches is taken.
type azureRecord struct {
	Time            time.Time `json:"time"`
	Category        string    `json:"category"`
	OperationName   string    `json:"operationName"`
	ResultSignature string    `json:"resultSignature"`
	CorrelationID   string    `json:"correlationId"`
	Identity        struct {
		Claim map[string]any `json:"claim"`
	} `json:"identity"`
	Properties struct {
		ID             string `json:"id"`
		RequestURI     string `json:"requestUri"`
		HTTPStatusCode int    `json:"httpStatusCode"`
		RequestID      string `json:"requestId"`
	} `json:"properties"`
}

// parseAzure reads blobs of insights-logs-auditevent: {"records": ...}, or lines.
func parseAzure(doc json.RawMessage) ([]Call, error) {
	type file struct {
		Records []azureRecord `json:"records"`
		azureRecord
	}
	docs, err := list[file](doc)
	if err != nil {
		return nil, err
	}
	var calls []Call
	for _, d := range docs {
		for _, r := range append(d.Records, d.azureRecord) {
			if r.Category == "AuditEvent" && r.key() != "" {
				calls = append(calls, r.call())
			}
		}
	}
	return calls, nil
}

// key is the key's URL, with its version: the object's id, or the part of the request's URL before the operation.
func (r *azureRecord) key() string {
	uri := r.Properties.ID
	if uri == "" {
		uri, _, _ = strings.Cut(r.Properties.RequestURI, "?")
	}
	vault, path, ok := strings.Cut(uri, "/keys/")
	if !ok {
		return ""
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	return vault + "/keys/" + strings.Join(parts[:min(len(parts), 2)], "/")
}

func (r *azureRecord) call() Call {
	c := Call{Time: r.Time, Key: r.key(), Op: r.OperationName}
	for _, name := range []string{"appid", "http://schemas.microsoft.com/identity/claims/objectidentifier"} {
		if v, ok := r.Identity.Claim[name].(string); ok && c.Principal == "" {
			c.Principal = v
		}
	}
	if code := r.Properties.HTTPStatusCode; code >= 300 || code == 0 && r.ResultSignature != "OK" {
		c.Failure = strings.TrimSpace(fmt.Sprintf("%d %s", code, r.ResultSignature))
	}
	for _, id := range []string{r.CorrelationID, r.Properties.RequestID} {
		if id != "" {
			c.IDs = append(c.IDs, id)
		}
	}
	return c
}

// vaultEntry is a line of an audit device ("Audit log entry schema").
type vaultEntry struct {
	Time  time.Time `json:"time"`
	Type  string    `json:"type"`
	Error string    `json:"error"`
	Auth  struct {
		DisplayName string `json:"display_name"`
	} `json:"auth"`
	Request struct {
		ID        string              `json:"id"`
		Path      string              `json:"path"`
		Operation string              `json:"operation"`
		Headers   map[string][]string `json:"headers"`
		Namespace struct {
			Path string `json:"path"`
		} `json:"namespace"`
	} `json:"request"`
}

const noResponse = "no response"

// parseVault reads lines of an audit device. A call has two: a request and its response, with one id.
func parseVault(doc json.RawMessage) ([]Call, error) {
	entries, err := list[vaultEntry](doc)
	if err != nil {
		return nil, err
	}
	var calls []Call
	for _, e := range entries {
		parts := strings.Split(e.Request.Path, "/") // MOUNT/OPERATION/NAME
		if len(parts) < 3 || !slices.Contains([]string{"encrypt", "decrypt", "keys", "rewrap", "datakey", "export"}, parts[len(parts)-2]) {
			continue
		}
		c := Call{Time: e.Time, Key: strings.Join(parts[:len(parts)-2], "/") + "/keys/" + parts[len(parts)-1], Op: e.Request.Operation + " " + e.Request.Path,
			Principal: e.Auth.DisplayName, Failure: e.Error, IDs: []string{e.Request.ID}}
		for name, values := range e.Request.Headers {
			if strings.EqualFold(name, "X-Correlation-Id") {
				c.IDs = append(c.IDs, values...)
			}
		}
		if e.Type == "request" && c.Failure == "" {
			c.Failure = noResponse
		}
		calls = append(calls, c)
	}
	return calls, nil
}

// answeredOnly leaves out the requests that have a response.
func answeredOnly(calls []Call) []Call {
	answered := make(map[string]bool)
	for _, c := range calls {
		answered[c.IDs[0]] = answered[c.IDs[0]] || c.Failure != noResponse
	}
	return slices.DeleteFunc(calls, func(c Call) bool { return c.Failure == noResponse && answered[c.IDs[0]] })
}

// parseKMSim reads the log of test/kmsim.
func parseKMSim(doc json.RawMessage) ([]Call, error) {
	type entry struct {
		Time      time.Time `json:"time"`
		RequestID string    `json:"request_id"`
		Op        string    `json:"op"`
		Key       string    `json:"key"`
		Principal string    `json:"principal"`
		Outcome   string    `json:"outcome"`
		CallersID string    `json:"callers_id"`
	}
	entries, err := list[entry](doc)
	if err != nil {
		return nil, err
	}
	var calls []Call
	for _, e := range entries {
		c := Call{Time: e.Time, Key: e.Key, Op: e.Op, Principal: e.Principal, IDs: []string{e.RequestID}}
		if e.Outcome != "ok" {
			c.Failure = e.Outcome
		}
		if e.CallersID != "" {
			c.IDs = append(c.IDs, e.CallersID)
		}
		calls = append(calls, c) // those of no key as well: an error may be all that has an id
	}
	return calls, nil
}
