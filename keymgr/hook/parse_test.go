package hook

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	disableKey = `{"version": "0", "source": "aws.kms", "detail-type": "AWS API Call via CloudTrail", "resources": [],
		"detail": {"eventSource": "kms.amazonaws.com", "eventName": "DisableKey",
			"requestParameters": {"keyId": "1234abcd-12ab-34cd-56ef-1234567890ab"}, "responseElements": null,
			"resources": [{"accountId": "111122223333", "type": "AWS::KMS::Key", "ARN": "arn:aws:kms:us-west-2:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"}]}}`
	deletion = `{"source": "aws.kms", "detail-type": "KMS CMK Deletion", "resources": ["arn:aws:kms:us-west-2:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"],
		"detail": {"key-id": "1234abcd-12ab-34cd-56ef-1234567890ab"}}`
	newVersion = `[{"id": "1", "topic": "/subscriptions/x", "subject": "k", "eventType": "Microsoft.KeyVault.KeyNewVersionCreated",
		"data": {"Id": "https://Sample.vault.azure.net/keys/k/abc", "VaultName": "sample", "ObjectType": "Key", "ObjectName": "k", "Version": "abc", "NBF": null, "EXP": null}}]`
	policyChanged = `{"specversion": "1.0", "type": "Microsoft.KeyVault.VaultAccessPolicyChanged", "data": {"Id": "https://sample.vault.azure.net", "VaultName": "sample"}}`
	validation    = `[{"eventType": "Microsoft.EventGrid.SubscriptionValidationEvent", "data": {"validationCode": "512d38b6", "validationUrl": "https://example"}}]`
	logEntry      = `{"logName": "projects/p/logs/cloudaudit.googleapis.com%2Factivity", "protoPayload": {"serviceName": "cloudkms.googleapis.com",
		"methodName": "UpdateCryptoKeyVersion", "resourceName": "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"}}`
)

func pubSub(entry string) string {
	return `{"message": {"data": "` + base64.StdEncoding.EncodeToString([]byte(entry)) + `", "messageId": "1"}, "subscription": "projects/p/subscriptions/s"}`
}

func TestNoticesAreUnderstood(t *testing.T) {
	const (
		awsKey = "aws-kms:arn:aws:kms:us-west-2:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
		azure  = "azure-kv:https://sample.vault.azure.net/keys/k"
		google = "gcp-kms:projects/p/locations/l/keyRings/r/cryptoKeys/k"
	)
	for name, tc := range map[string]struct{ body, source, what, cmk string }{
		"EventBridge, a call":         {disableKey, "EventBridge", "DisableKey", awsKey},
		"EventBridge, an event":       {deletion, "EventBridge", "KMS CMK Deletion", awsKey},
		"Event Grid":                  {newVersion, "Event Grid", "Microsoft.KeyVault.KeyNewVersionCreated", azure},
		"CloudEvents, a vault":        {policyChanged, "Event Grid", "Microsoft.KeyVault.VaultAccessPolicyChanged", azure},
		"Pub/Sub":                     {pubSub(logEntry), "Pub/Sub", "UpdateCryptoKeyVersion", google},
		"a log entry by itself":       {logEntry, "Cloud Logging", "UpdateCryptoKeyVersion", google},
		"a policy of a key ring":      {pubSub(strings.Replace(logEntry, "/cryptoKeys/k/cryptoKeyVersions/1", "", 1)), "Pub/Sub", "UpdateCryptoKeyVersion", google},
		"a call with the id alone":    {strings.Replace(disableKey, "arn:aws:kms:us-west-2:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab", "", 1), "EventBridge", "DisableKey", awsKey},
		"a name with its service":     {strings.Replace(logEntry, `"projects/p/loc`, `"//cloudkms.googleapis.com/projects/p/loc`, 1), "Cloud Logging", "UpdateCryptoKeyVersion", google},
		"a call by the ARN of a key":  {strings.Replace(disableKey, `"keyId": "`, `"keyId": "arn:aws:kms:us-west-2:111122223333:key/`, 1), "EventBridge", "DisableKey", awsKey},
		"white space before an array": {"\n " + newVersion, "Event Grid", "Microsoft.KeyVault.KeyNewVersionCreated", azure},
	} {
		n, err := Parse([]byte(tc.body))
		if err != nil || n.Source != tc.source || n.What != tc.what {
			t.Errorf("%s: %+v, %v", name, n, err)
			continue
		}
		for _, cmk := range []string{awsKey, azure, google, "dev", "local:dev", awsKey + "0", azure + "2", google + "2"} {
			if got, want := n.Matches(cmk), cmk == tc.cmk || strings.HasPrefix(cmk, azure) && strings.Contains(name, "vault") || strings.HasPrefix(cmk, google) && strings.Contains(name, "ring"); got != want {
				t.Errorf("%s: of %s: %v, want %v (names %v)", name, cmk, got, want, n.Names)
			}
		}
	}
}

func TestValidationIsAsked(t *testing.T) {
	n, err := Parse([]byte(validation))
	if diff := cmp.Diff(Notice{Source: "Event Grid", What: "Microsoft.EventGrid.SubscriptionValidationEvent", Validation: "512d38b6"}, n); diff != "" || err != nil {
		t.Error(err, diff)
	}
}

func TestWhatIsNoNoticeIsRefused(t *testing.T) {
	for _, body := range []string{"", "{", "[]", "null", "7", `{"a": 1}`, `{"message": {"data": "!"}}`, pubSub("{}"), pubSub("x"),
		`{"detail-type": "x", "detail": 5}`, "[" + strings.Repeat(newVersion[1:len(newVersion)-1]+",", 80) + newVersion[1:]} {
		if n, err := Parse([]byte(body)); err == nil {
			t.Errorf("%.60q: %+v", body, n)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, body := range []string{disableKey, deletion, newVersion, policyChanged, validation, logEntry, pubSub(logEntry)} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		n, err := Parse(body)
		if err == nil && (n.Source == "" || len(n.Names) > maxNames) {
			t.Errorf("%+v", n)
		}
		n.Matches("aws-kms:arn:aws:kms:r:1:key/k")
	})
}
