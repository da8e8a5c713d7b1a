package hook

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
)

// Notice is what a request says: that something was done to keys, or a service's question
// whether this is the right address.
type Notice struct {
	Source string   // "EventBridge", "Event Grid", "Pub/Sub", "Cloud Logging"
	What   string   // in the service's words: "DisableKey"
	Names  []string // of keys, of versions of keys, or of what keys are in
	// Validation is the code that Event Grid wants back; empty: it asks for none.
	Validation string
}

const (
	maxNames    = 64
	maxNameSize = 2048
)

var errForm = errors.New("want an event of EventBridge, Event Grid or Pub/Sub, as JSON")

// envelope has the members by which the services' events are told apart.
type envelope struct {
	// EventBridge
	Source     string          `json:"source"`
	DetailType string          `json:"detail-type"`
	Detail     json.RawMessage `json:"detail"`
	Resources  []string        `json:"resources"`
	// Pub/Sub, and a log entry without its wrapping
	Message *struct {
		Data string `json:"data"`
	} `json:"message"`
	ProtoPayload *auditPayload `json:"protoPayload"`
	// Event Grid: its own schema, and CloudEvents
	EventType string     `json:"eventType"`
	Type      string     `json:"type"`
	Spec      string     `json:"specversion"`
	Data      *vaultData `json:"data"`
}

// auditPayload is of an entry of Google's Cloud Audit Logs.
type auditPayload struct {
	MethodName   string `json:"methodName"`
	ResourceName string `json:"resourceName"`
}

// trail is of a CloudTrail record.
type trail struct {
	EventName         string `json:"eventName"`
	RequestParameters struct {
		KeyID string `json:"keyId"`
	} `json:"requestParameters"`
	Resources []struct {
		ARN string `json:"ARN"`
	} `json:"resources"`
}

// vaultData is of an event of Azure Key Vault.
type vaultData struct {
	ID             string `json:"Id"`
	ValidationCode string `json:"validationCode"`
}

// Parse reads one request's body.
func Parse(body []byte) (Notice, error) {
	text := strings.TrimLeft(string(body[:min(len(body), 64)]), " \t\r\n")
	var events []envelope
	if strings.HasPrefix(text, "[") {
		if err := json.Unmarshal(body, &events); err != nil {
			return Notice{}, errForm
		}
	} else {
		events = make([]envelope, 1)
		if err := json.Unmarshal(body, &events[0]); err != nil {
			return Notice{}, errForm
		}
	}
	var all Notice
	for i := range events {
		n, err := events[i].notice()
		if err != nil {
			return Notice{}, err
		}
		all.Source, all.What = n.Source, n.What
		all.Names = append(all.Names, n.Names...)
		if n.Validation != "" {
			all.Validation = n.Validation
		}
	}
	if all.Source == "" {
		return Notice{}, errForm
	}
	return all, all.check()
}

func (n *Notice) check() error {
	if len(n.Names) > maxNames {
		return errors.New("too many keys in one notice")
	}
	for _, text := range append([]string{n.What, n.Validation}, n.Names...) {
		if len(text) > maxNameSize {
			return errors.New("a name in the notice is too long")
		}
	}
	return nil
}

func (n *Notice) name(name string) {
	if name != "" {
		n.Names = append(n.Names, name)
	}
}

func (e *envelope) notice() (Notice, error) {
	switch {
	case e.Message != nil:
		return e.pubSub()
	case e.ProtoPayload != nil:
		return e.ProtoPayload.notice("Cloud Logging"), nil
	case e.DetailType != "":
		return e.eventBridge()
	case e.EventType != "":
		return e.eventGrid(e.EventType), nil
	case e.Spec != "" && e.Type != "":
		return e.eventGrid(e.Type), nil
	}
	return Notice{}, errForm
}

func (p *auditPayload) notice(source string) Notice {
	n := Notice{Source: source, What: p.MethodName}
	// Some methods name the resource with its service: //cloudkms.googleapis.com/projects/…
	n.name(strings.TrimPrefix(p.ResourceName, "//cloudkms.googleapis.com/"))
	return n
}

func (e *envelope) pubSub() (Notice, error) {
	data, err := base64.StdEncoding.DecodeString(e.Message.Data)
	if err != nil {
		return Notice{}, errors.New("the data of the Pub/Sub message is not base64")
	}
	var entry envelope
	if err := json.Unmarshal(data, &entry); err != nil || entry.ProtoPayload == nil {
		return Notice{}, errors.New("the Pub/Sub message is no entry of an audit log: want a log router's sink as its source")
	}
	return entry.ProtoPayload.notice("Pub/Sub"), nil
}

func (e *envelope) eventBridge() (Notice, error) {
	n := Notice{Source: "EventBridge", What: e.DetailType}
	for _, arn := range e.Resources {
		n.name(arn)
	}
	var t trail
	if len(e.Detail) > 0 {
		if err := json.Unmarshal(e.Detail, &t); err != nil {
			return Notice{}, errors.New("the detail of the EventBridge event is no CloudTrail record")
		}
	}
	if t.EventName != "" {
		n.What = t.EventName
	}
	n.name(t.RequestParameters.KeyID)
	for _, r := range t.Resources {
		n.name(r.ARN)
	}
	return n, nil
}

func (e *envelope) eventGrid(what string) Notice {
	n := Notice{Source: "Event Grid", What: what}
	if e.Data != nil {
		n.name(e.Data.ID)
		if what == "Microsoft.EventGrid.SubscriptionValidationEvent" {
			n.Validation = e.Data.ValidationCode
		}
	}
	return n
}

// Matches tells whether the notice is of a CMK: it names the key, a version of it, an id that
// the ARN ends in, or what the key is in (a key ring, a vault).
func (n *Notice) Matches(cmk string) bool {
	kind, key, ok := strings.Cut(cmk, ":")
	if !ok {
		return false // the development KMS sends no notices
	}
	for _, name := range n.Names {
		if kind == "azure-kv" {
			name, key = strings.ToLower(name), strings.ToLower(key)
		}
		switch {
		case name == key, within(name, key), within(key, name) && strings.Contains(name, "/"):
			return true
		case kind == "aws-kms" && strings.HasSuffix(key, ":key/"+name):
			return true
		}
	}
	return false
}

// within tells whether a name is of something inside another's.
func within(name, outer string) bool {
	outer = strings.TrimSuffix(outer, "/")
	return outer != "" && strings.HasPrefix(name, outer+"/")
}
